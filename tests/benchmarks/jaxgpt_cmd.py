"""jaxgpt's side of a comparison of trainers and samplers: the work in BENCH_WORK, one JSON line.

BENCH_WORK is JSON: `kind` (train or sample), the model's shape (L layers, H heads, D wide, T
tokens, B sequences, V ids), and `steps`, `warmup`, or `new`, `prompt`, `gens`; BENCH_T0 is when the
process was started. JAXGPT_DTYPE is the compute dtype. The steps are those of `jaxgpt.train`, and
the tokens of `jaxgpt.sample`; the process starts as theirs does.
"""

import json
import os
import resource
import sys
import time

import numpy as np

from jaxgpt.system import accelerators, pages

LEARNING_RATE = 6e-4


def config_of(work: dict):
    from jaxgpt.config import ComputeConfig, Config, MeshConfig, ModelConfig, OptimConfig

    model = ModelConfig(
        vocab_size=work["V"],
        max_seq_len=work["T"],
        num_layers=work["L"],
        num_heads=work["H"],
        embed_dim=work["D"],
        bias=work["kind"] == "sample",
    )
    return Config(
        batch_size=work["B"],
        num_steps=100_000,
        model=model.with_sizes(),
        compute=ComputeConfig(dtype=os.environ.get("JAXGPT_DTYPE", "float32")),
        mesh=MeshConfig(1, 1, 1),
        optim=OptimConfig(learning_rate=LEARNING_RATE, warmup_steps=1, schedule="constant"),
    )


def batches(work: dict):
    """Yields inputs and targets [B, T] from random places of the same random tokens."""
    tokens = np.random.default_rng(0).integers(0, work["V"], 1_000_000).astype(np.uint16)
    rng, (rows, length) = np.random.default_rng(1), (work["B"], work["T"])
    while True:
        starts = rng.integers(0, len(tokens) - length - 1, rows)
        ids = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int32)
        yield ids[:, :-1], ids[:, 1:]


def train(work: dict, began: float) -> dict:
    import jax

    from jaxgpt.parallel.mesh import make_mesh
    from jaxgpt.training.setup import make_training

    config = config_of(work)
    mesh = make_mesh(config, jax.devices()[:1])
    seconds, losses, first = [], [], None
    with jax.set_mesh(mesh):
        training = make_training(config, mesh)
        state, step = training.first_state(), training.compile_step()
        size = sum(a.size for a in jax.tree.leaves(state.params)) - work["T"] * work["D"]
        data = batches(work)
        for index in range(work["warmup"] + work["steps"]):
            if index == work["warmup"]:
                meter = Meter()
            started = time.perf_counter()
            batch = dict(zip(("inputs", "targets"), next(data), strict=True))
            batch = {n: jax.device_put(a[None], training.batch_sharding) for n, a in batch.items()}
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            first = first or time.time() - began
            seconds.append(time.perf_counter() - started)
    timed = seconds[work["warmup"] :]
    return dict(first_s=first, step_s=timed, losses=losses, n_params=size) | meter.read()


def sample(work: dict, began: float) -> dict:
    import jax

    from jaxgpt.inference.decode import Decoder, generate
    from jaxgpt.inference.requests import Sampling
    from jaxgpt.model import ModelSpec
    from jaxgpt.parallel.mesh import make_mesh

    config = config_of(work)
    spec = ModelSpec(config, "xla")
    jax.set_mesh(make_mesh(config, jax.devices()[:1]))
    decoder = Decoder.of(spec, jax.jit(spec.init)(jax.random.key(0)), spec.model.vocab_size)
    prompts = [np.arange(work["prompt"], dtype=np.int32) + row for row in range(work["B"])]
    generate(decoder, prompts, work["new"], Sampling(0.8, 200))
    first, seconds, meter = time.time() - began, [], Meter()
    for _ in range(work["gens"]):
        started = time.perf_counter()
        generate(decoder, prompts, work["new"], Sampling(0.8, 200))
        seconds.append(time.perf_counter() - started)
    return dict(first_s=first, gen_s=seconds, n_params=0) | meter.read()


class Meter:
    """CPU time of this process and of all others, in shares of one core, since it was made."""

    def __init__(self):
        self.start = self._now()

    def _now(self) -> np.ndarray:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return np.array([time.perf_counter(), time.process_time(), busy])

    def read(self) -> dict:
        wall, own, busy = self._now() - self.start
        return dict(foreign_cpu=round(max(0.0, (busy - own) / wall), 3), own_cpu=own / wall)


if __name__ == "__main__":
    if pages.TUNABLES not in os.environ and pages.HUGE_PAGES.exists():
        # what `use_huge_pages` does for commands
        os.environ[pages.TUNABLES] = pages.HUGE
        os.execv(sys.executable, [sys.executable, *sys.argv])
    accelerators.leave_out_absent()
    work, began = json.loads(os.environ["BENCH_WORK"]), float(os.environ["BENCH_T0"])
    result = {"train": train, "sample": sample}[work["kind"]](work, began)
    result["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result), flush=True)
