"""What sparse attention costs against full attention: time and memory from 1k to 64k tokens.

    python tests/benchmarks/attention_cost.py [--longest=65536] [--turns=3] [--gib=6]

One sequence, one head of width 64, float32, causal, value and gradient. Patterns take turns, and
each time is the least of its turns; memory is what the compiled program holds beside its arguments
and results. What would need more than `--gib` is compiled but not run. Writes attention_cost.json
and attention_cost.svg beside this file.
"""

import argparse
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.ops.kernels import KERNELS
from jaxgpt.ops.mask import AttentionMask, Reach
from jaxgpt.ops.sparse.kernels import SPARSE_KERNELS, sparse_kernel
from jaxgpt.ops.sparse.lsh import unit_length
from jaxgpt.ops.sparse.patterns import patterns_of

KINDS = {  # reach at 64k: 256, 768 + 256, 256 + 256 + 256, 256 + 256, 5 blocks, 2 x 2 chunks
    "full": dict(attention_pattern="full"),
    "longformer": dict(attention_pattern="longformer", sparse_block=256),
    "dilated": dict(attention_pattern="longformer", sparse_block=256, dilation=4),
    "strided": dict(attention_pattern="strided", sparse_block=256),
    "axial": dict(attention_pattern="axial", sparse_block=256),
    "bigbird": dict(attention_pattern="bigbird", sparse_block=64, random_blocks=2),
    "lsh": dict(attention_pattern="lsh", sparse_block=64, hash_rounds=2),
}
COLOURS = ("#d62728", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
WIDTH, HEIGHT, MARGIN = 380, 260, 60


def compiled(kind: str, length: int):
    """Returns the compiled value and gradient of one pattern's attention."""
    pattern = patterns_of(ModelConfig(max_seq_len=length, **KINDS[kind]))[True]
    attend = SPARSE_KERNELS[sparse_kernel("xla", pattern)] if pattern else KERNELS["xla"]

    def total(q, k, v):
        at = jnp.arange(length)[None]
        mask = AttentionMask(at, at, reach=Reach(pattern=pattern))
        keys = unit_length(q) if kind == "lsh" else k
        return jnp.sum(attend(q, keys, v, mask, scale=1 / 8) ** 2)

    array = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    return run.lower(array, array, array).compile()


def measure(longest: int, turns: int, gib: float) -> list[dict]:
    """Returns a row per pattern and length: seconds (None: not run) and GiB."""
    rows, length = [], 1024
    while length <= longest:
        programs = {kind: compiled(kind, length) for kind in KINDS}
        memory = {k: p.memory_analysis().temp_size_in_bytes / 2**30 for k, p in programs.items()}
        drawn = [jax.random.normal(jax.random.key(i), (1, length, 1, 64)) for i in range(3)]
        seconds = {kind: math.inf for kind in KINDS}
        for _ in range(turns + 1):  # the first warms up, and counts if it is the fastest
            for kind in (k for k in KINDS if memory[k] <= gib):
                began = time.perf_counter()
                jax.block_until_ready(programs[kind](*drawn))
                seconds[kind] = min(seconds[kind], time.perf_counter() - began)
        for kind in KINDS:
            took = seconds[kind] if math.isfinite(seconds[kind]) else None
            rows.append(dict(pattern=kind, length=length, seconds=took, gib=memory[kind]))
            print(json.dumps(rows[-1]), flush=True)
        length *= 2
    return rows


def plot(rows: list[dict]) -> str:
    """Returns an SVG of two panels, time and memory over length, both axes logarithmic."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (WIDTH + MARGIN) + 120}"'
        f' height="{HEIGHT + 2 * MARGIN}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, (what, title) in enumerate((("seconds", "seconds"), ("gib", "memory, GiB"))):
        lines += _panel(rows, what, title, MARGIN + i * (WIDTH + MARGIN))
    for i, kind in enumerate(KINDS):
        at = f'x="{2 * (WIDTH + MARGIN) + 20}" y="{MARGIN + 18 * i}"'
        lines.append(f'<text {at} fill="{COLOURS[i]}">{kind}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(rows, what, title, left):
    found = [row for row in rows if row[what]]
    lengths = sorted({row["length"] for row in found})
    low = math.floor(math.log10(min(row[what] for row in found)))
    high = math.ceil(math.log10(max(row[what] for row in found)))
    bottom, inner = MARGIN + HEIGHT, WIDTH - 20

    def x(length):
        return left + inner * math.log2(length / lengths[0]) / max(
            math.log2(lengths[-1] / lengths[0]), 1
        )

    def y(value):
        return bottom - HEIGHT * (math.log10(value) - low) / max(high - low, 1)

    yield f'<text x="{left}" y="{MARGIN - 16}" font-weight="bold">{title} over tokens</text>'
    for length in lengths:
        at = f'x="{x(length):.0f}" y="{bottom + 18}" text-anchor="middle"'
        yield f"<text {at}>{length // 1024}k</text>"
    for power in range(low, high + 1):
        yield f'<path d="M{left} {y(10**power):.0f}h{inner}" stroke="#ddd"/>'
        yield f'<text x="{left - 4}" y="{y(10**power) + 4:.0f}" text-anchor="end">1e{power}</text>'
    for kind, colour in zip(KINDS, COLOURS, strict=True):
        points = [(x(r["length"]), y(r[what])) for r in found if r["pattern"] == kind]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield from (f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=65536)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--gib", type=float, default=6.0)
    args = parser.parse_args()
    found, here = measure(args.longest, args.turns, args.gib), Path(__file__).parent
    versions = {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    text = json.dumps(versions | {"rows": found}, indent=1)
    (here / "attention_cost.json").write_text(text + "\n")
    (here / "attention_cost.svg").write_text(plot(found))
