"""The steady state of a config's training and decoding on this machine."""

import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Config
from jaxgpt.data.pipeline import device_batches
from jaxgpt.inference.decode import Decoder, generate
from jaxgpt.inference.samplers import Sampling
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.parameters.flops import PEAK_FLOPS
from jaxgpt.planning.profile import PARTS, seconds_by_part
from jaxgpt.planning.program import Program
from jaxgpt.system.console import say
from jaxgpt.system.programs import keep_no_programs
from jaxgpt.training.memory import check_memory
from jaxgpt.training.objectives import companions_of
from jaxgpt.training.setup import Training, make_training, resolve_vocab

WARM_UP, PROFILED = 2, 3  # steps before the timed ones, and after them
PROMPT, NEW = 16, 200  # tokens


def benchmark(
    config: Config, steps: int, decode: bool, folder: str, began: float
) -> dict[str, Any]:
    """Returns the figures that `jaxgpt.benchmark` prints: see its help. The command began at
    `began`; a `folder` keeps the profile.
    """
    keep_no_programs()  # what is compiled is timed
    mesh = make_mesh(config)
    companions = companions_of(config.objective)
    data = companions.prepare(config)
    config = companions.completed(config, data)
    training = make_training(resolve_vocab(config, data.tokenizer.vocab_size), mesh)
    device, count = mesh.devices.flat[0], mesh.devices.size
    with jax.set_mesh(mesh):
        check_memory(training.abstract_state(), mesh, training.abstract_companions())
        stream = training.companions.stream(training.config, data)
        stream = training.companions.taught(stream, data)
        compiling = time.perf_counter()
        compiled = training.compile_step()
        compile_seconds = time.perf_counter() - compiling
        say(f"compile   {compile_seconds:.1f}s")
        step = training.beside_companions(compiled)
        last = 1 + WARM_UP + steps + PROFILED
        batches = device_batches(stream, training.batch_sharding, 0, last)
        state = training.first_state()
        state, seconds = _take(step, state, batches, 1)
        first_step_seconds = time.perf_counter() - began
        state, seconds = _take(step, state, batches, WARM_UP)
        state, seconds = _take(step, state, batches, steps)
        peak_memory = _peak_memory(device)
        with tempfile.TemporaryDirectory() as scratch:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            where = Path(folder or scratch)
            with jax.profiler.trace(
                str(where), create_perfetto_trace=bool(folder), profiler_options=options
            ):
                state, _ = _take(step, state, batches, PROFILED)
            parts = seconds_by_part(where, Program(compiled.as_text()))
        speed = _decode_speed(training, state.params) if decode else None
    rate = _matmul_rate(config.compute.dtype, device)  # of one device: outside the mesh
    model, step_seconds = training.spec.model, seconds["all"]
    tokens_per_second = config.batch_size * model.max_seq_len / step_seconds
    machines = 1 if device.platform == "cpu" else count  # CPU devices share this machine's cores
    return {
        "step_seconds": step_seconds,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * training.flops_per_token / (rate * machines),
        "matmul_flops_per_second": rate,
        "peak_memory_bytes": peak_memory,
        "compile_seconds": compile_seconds,
        "first_step_seconds": first_step_seconds,
        "decode_tokens_per_second": speed,
        "time_shares": _shares(seconds, parts),
    }


def _take(step, state, batches, count: int):
    """Takes `count` steps and waits for them; returns the state and the seconds per step: in "all",
    waiting for "input", and of this thread's own work, "python"."""
    began, work, waited = time.perf_counter(), time.thread_time(), 0.0
    for _ in range(count):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    whole, work = time.perf_counter() - began, time.thread_time() - work
    python = min(work, whole - waited)
    return state, {"all": whole / count, "input": waited / count, "python": python / count}


def _shares(seconds: dict[str, float], parts: Counter) -> dict[str, float]:
    """Returns the shares of a step's time, which add up to 1: what is neither "input" nor "python"
    is the program's, divided as the profile's `parts` are. Where the profile names none of the
    program's instructions (kernels that a GPU launches as one graph), all of it is "other"."""
    shares = {name: seconds[name] / seconds["all"] for name in ("input", "python")}
    parts = parts if any(parts.values()) else Counter(other=1.0)
    program, total = 1 - sum(shares.values()), sum(parts.values())
    return {name: program * parts[name] / total for name in ("matmul", *PARTS, "other")} | shares


def _matmul_rate(dtype: str, device) -> float:
    """Returns the FLOP/s of `device` in products of matrices: its known peak, else the best of
    several products of 2048 x 2048."""
    if peak := PEAK_FLOPS.get(device.device_kind):
        return peak
    size = 2048
    matrix = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda a, b: a @ b).lower(matrix, matrix).compile()
    times = []
    for _ in range(8):
        began = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def _peak_memory(device) -> int:
    """Returns the most bytes in use so far: a device's own, or on a CPU this process's."""
    if stats := device.memory_stats():
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _decode_speed(training: Training, params: dict) -> float:
    """Returns the tokens per second of generating one row."""
    model = training.spec.model
    prompt = min(PROMPT, model.max_seq_len // 2)
    new = min(NEW, model.max_seq_len - prompt)
    decoder = Decoder.of(training.spec, params, model.vocab_size)
    prompts = [np.arange(prompt, dtype=np.int32) % model.vocab_size]
    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        generate(decoder, prompts, new, Sampling(0.8, 200))
    return new / (time.perf_counter() - began)
