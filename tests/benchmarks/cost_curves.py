"""What a step costs as it grows, on this machine's CPU: time over tokens, memory over the batch,
compilation over depth. Times are CPU seconds of the process: other work hardly changes them.

    python tests/benchmarks/cost_curves.py [--part=tokens,memory,depth]

  tokens  CPU seconds of a step of one sequence, T 128 to 4096, beside the FLOPs it takes
  memory  bytes of the compiled step's temporaries, batches of 1 to 32
  depth   CPU seconds to compile 4 to 24 layers and CPU seconds of a step, scanned and unrolled

Programs take turns and each time is the least of its turns. Keeps the figures in cost_curves.json
beside this file and draws them all in cost_curves.svg.
"""

import argparse
import json
import math
import time
from pathlib import Path

import jax
import numpy as np

from jaxgpt.config import ComputeConfig, Config, MeshConfig, ModelConfig
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.training.setup import Training, make_training

WIDE = dict(vocab_size=4096, num_layers=4, num_heads=12, embed_dim=768)
NARROW = dict(vocab_size=4096, num_heads=6, embed_dim=384, max_seq_len=256)
LENGTHS, BATCHES = (128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16, 32)
DEPTHS, SCANS = (4, 8, 12, 16, 24), ("scanned", "unrolled")
TURNS = 3
WIDTH, HEIGHT, MARGIN = 300, 220, 60
COLOURS = ("#1f77b4", "#d62728")


class Program:
    """The compiled train step of a shape, and what compiling took."""

    def __init__(self, shape: dict, batch: int, scan: str = "auto"):
        model, compute = ModelConfig(**shape).with_sizes(), ComputeConfig(scan_layers=scan)
        config = Config(batch_size=batch, model=model, compute=compute, mesh=MeshConfig(1, 1, 1))
        self.mesh = make_mesh(config, jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            self.training: Training = make_training(config, self.mesh)
            began = time.process_time()
            self.step = self.training.compile_step()
            self.compile_seconds = time.process_time() - began
        self.rows = batch, model.max_seq_len
        self.flops = batch * model.max_seq_len * self.training.flops_per_token

    @property
    def temporaries(self) -> int:
        return self.step.memory_analysis().temp_size_in_bytes

    def start(self) -> None:
        """Makes the state, and a batch."""
        with jax.set_mesh(self.mesh):
            self.state = self.training.first_state()
        ids = np.random.randint(0, 4096, (1, *self.rows), np.int32)
        self.batch = {
            name: jax.device_put(ids, self.training.batch_sharding)
            for name in self.training.companions.batch_arrays()
        }

    def turn(self) -> float:
        """Returns the CPU seconds of a step."""
        began = time.process_time()
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(metrics)
        return time.process_time() - began


def least(programs: list[Program]) -> list[float]:
    """Returns the least CPU seconds of a step of each program; they take turns."""
    for program in programs:
        program.start()
        program.turn()
    return [min(times) for times in zip(*([p.turn() for p in programs] for _ in range(TURNS)))]


def tokens() -> list[dict]:
    programs = [Program(WIDE | {"max_seq_len": length}, 1) for length in LENGTHS]
    return [
        dict(tokens=length, seconds=seconds, flops=program.flops)
        for length, seconds, program in zip(LENGTHS, least(programs), programs, strict=True)
    ]


def memory() -> list[dict]:
    shape = NARROW | {"num_layers": 4}
    return [dict(batch=batch, bytes=Program(shape, batch).temporaries) for batch in BATCHES]


def depth() -> list[dict]:
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled is timed
    rows = []
    for layers in DEPTHS:
        shape = NARROW | {"num_layers": layers}
        pair = [Program(shape, 4, scan) for scan in ("true", "false")]
        steps = least(pair)
        compiles = [program.compile_seconds for program in pair]
        rows.append(
            dict(layers=layers)
            | dict(zip(("scanned_compile_seconds", "unrolled_compile_seconds"), compiles))
            | dict(zip(("scanned_step_seconds", "unrolled_step_seconds"), steps))
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


PARTS = {"tokens": tokens, "memory": memory, "depth": depth}


def plot(found: dict) -> str:
    """Returns an SVG of the panels whose figures are there."""
    panels = []
    if rows := found.get("tokens"):
        flops = [(r["tokens"], r["flops"] * rows[-1]["seconds"] / rows[-1]["flops"]) for r in rows]
        lines = {"measured": _points(rows, "tokens", "seconds"), "as the FLOPs": flops}
        panels.append(("CPU seconds a step, over tokens", lines))
    if rows := found.get("memory"):
        points = [(r["batch"], r["bytes"] / 2**20) for r in rows]
        panels.append(("MiB of temporaries, over batch", {"compiled": points}))
    if rows := found.get("depth"):
        for what, title in (("compile", "CPU seconds to compile"), ("step", "CPU seconds a step")):
            lines = {s: _points(rows, "layers", f"{s}_{what}_seconds") for s in SCANS}
            panels.append((f"{title}, over layers", lines))
    size = f'width="{len(panels) * (WIDTH + MARGIN) + MARGIN}" height="{HEIGHT + 2 * MARGIN}"'
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif"']
    svg += [' font-size="12">', '<rect width="100%" height="100%" fill="white"/>']
    for number, (title, lines) in enumerate(panels):
        svg += _panel(title, lines, MARGIN + number * (WIDTH + MARGIN))
    return "\n".join([*svg, "</svg>"]) + "\n"


def _points(rows: list[dict], x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in rows]


def _panel(title: str, lines: dict, left: int):
    xs = sorted({x for points in lines.values() for x, _ in points})
    top = max(y for points in lines.values() for _, y in points)
    tick = 10 ** math.floor(math.log10(top))
    tick = next(t for t in (tick / 5, tick / 2, tick, 2 * tick) if top / t <= 6)
    bottom = MARGIN + HEIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        return left + WIDTH * x / xs[-1], bottom - HEIGHT * y / (top * 1.05)

    yield f'<text x="{left}" y="{MARGIN - 24}" font-weight="bold">{title}</text>'
    for n in range(math.floor(top / tick) + 1):
        x, y = at(0, n * tick)
        yield f'<path d="M{x:.0f} {y:.0f}h{WIDTH}" stroke="#ddd"/>'
        yield f'<text x="{x - 4:.0f}" y="{y + 4:.0f}" text-anchor="end">{n * tick:.3g}</text>'
    for x in (x for x in xs if x >= xs[-1] / 8):
        yield f'<text x="{at(x, 0)[0]:.0f}" y="{bottom + 18}" text-anchor="middle">{x}</text>'
    for number, (name, points) in enumerate(lines.items()):
        colour, places = COLOURS[number], [at(*point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places)
        at_name = f'x="{left + 8}" y="{MARGIN + 14 + 16 * number}"'
        yield f'<text {at_name} fill="{colour}">{name}</text>'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default=",".join(PARTS))
    file = Path(__file__).with_suffix(".json")
    for part in parser.parse_args().part.split(","):
        rows = PARTS[part]()
        found = json.loads(file.read_text()) if file.exists() else {}
        found |= {part: rows, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
        print(json.dumps(rows))
        file.write_text(json.dumps(found, indent=1) + "\n")
        file.with_suffix(".svg").write_text(plot(found))
