"""A plan: what one training step needs on given devices, and a lower bound of its time."""

import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.config import Config, ModelConfig
from jaxgpt.config.pipeline import schedule_of
from jaxgpt.config.schema import BATCH_AXES
from jaxgpt.model.stacked.blocks import layer_windows
from jaxgpt.ops.context.sharded import method_of, said
from jaxgpt.ops.sparse.kernels import kernel_name
from jaxgpt.ops.sparse.patterns import keys_seen, patterns_of
from jaxgpt.parallel.mesh import AXES, make_mesh, slices_of
from jaxgpt.parameters.flops import count_active, count_parameters
from jaxgpt.planning.hardware import Chip, quiet
from jaxgpt.planning.program import VMEM, Collective, Program
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path
from jaxgpt.training.setup import Training, make_training

MATMULS = {"fwd": 2, "dq": 3, "dkv": 4, "bwd": 5}  # in splash's and cuDNN's kernels
LARGEST = 10
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make_plan(
    config: Config,
    devices: list,
    chip: Chip | None,
    also: Callable[[Program, Path | None], dict] = lambda program, dump: {},
) -> dict[str, Any]:
    """Returns the values that `jaxgpt.plan` prints, except `topology` and suggestions.

    The config's vocabulary size must be known. `fits` is also false if the compiler runs out of
    memory. `also` returns more, from the program and, for TPUs, the folder that XLA dumped into.
    """
    began = time.perf_counter()
    with jax.set_mesh(mesh := make_mesh(config, devices)):
        training = make_training(config, mesh)
        state = training.abstract_state()
        plan = {
            "devices": len(devices),
            "slices": slices_of(mesh.devices),
            "parameters": count_parameters(state.params, training.spec.model),
            "active_parameters": count_active(state.params, training.spec.model),
            "mesh": dict(zip(AXES, mesh.devices.shape, strict=True)),
            "attention": kernel_name(training.spec.model, training.spec.kernel)
            + said(config, mesh.shape, training.spec.kernel),
            "pipeline_bubble": schedule_of(config, mesh.shape["pipeline"]).bubble,
        }
        arguments = _arguments(training, state)
        try:
            compiled, program, more = _compile(training, also)
        except jax.errors.JaxRuntimeError as e:
            measured = _too_large(str(e), arguments, chip)
        else:
            measured = _measure(compiled, program, arguments, training, chip) | more
    tokens = config.batch_size * config.model.max_seq_len
    plan |= measured | {"flops_per_step": tokens * training.flops_per_token}
    return plan | {"tokens_per_step": tokens, "compile_seconds": time.perf_counter() - began}


def _compile(training: Training, also: Callable) -> tuple[Any, Program, dict]:
    """Returns the compiled step, its program and what `also` says of it. A TPU's program is dumped
    by XLA during compilation, as some cannot be read back from the executable."""
    if training.mesh.devices.flat[0].platform != "tpu":
        try:
            with quiet():
                compiled = training.compile_step()
        except RuntimeError as e:
            if "cuDNN" not in str(e):
                raise
            raise BadInput(
                f"cuDNN's attention cannot be compiled ({e}): pip install -e '.[plan-gpu]', or plan"
                " with --config.compute.attention=xla"
            ) from e
        program = Program(compiled.as_text())
        return compiled, program, also(program, None)
    with tempfile.TemporaryDirectory() as folder, quiet():
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = training.compile_step(options)
        (file,) = Path(folder).glob("*jit_train_step*after_optimizations.txt")
        program = Program(file.read_text())
        return compiled, program, also(program, Path(folder))


def _measure(
    compiled, program: Program, arguments: list[dict], training: Training, chip: Chip | None
) -> dict:
    mesh, stats = training.mesh, compiled.memory_analysis()
    kept = stats.argument_size_in_bytes - stats.alias_size_in_bytes + stats.output_size_in_bytes
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "total": kept + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes,
        "limit": chip and chip.hbm,
    }
    flops = program.flops() + _kernel_flops(program, training)
    collectives = program.collectives(AXES, mesh.devices.shape, slices_of(mesh.devices))
    roofline = chip and {
        "compute": flops / chip.flops,
        "memory": program.hbm_bytes() / chip.hbm_bandwidth,
        "network": sum(
            chip.seconds(_volume(c), [mesh.devices.flat[at] for at in c.group]) for c in collectives
        ),
    }
    fits = chip is None or memory["total"] <= chip.hbm
    return {
        "fits": fits,
        **({} if fits else {"over_by": memory["total"] - chip.hbm}),
        "bytes_per_device": memory,
        "largest": sorted(arguments + _temporaries(program), key=lambda a: -a["bytes"])[:LARGEST],
        "compiled_flops_per_step": flops * mesh.size,
        "collectives": _table(collectives),
        "roofline_seconds": roofline,
        "bound_by": roofline and max(roofline, key=roofline.get),
    }


def _too_large(message: str, arguments: list[dict], chip: Chip | None) -> dict:
    """Returns the plan of a program for which the compiler says that memory is too small. Raises
    `BadInput` if it failed for another reason."""
    size = sum(a["bytes"] for a in arguments)
    total, limit = _needed_and_available(message, size, chip.hbm if chip else 0)
    sizes = {"arguments": size, "temporaries": total - size, "total": total, "limit": limit}
    return {
        "fits": False,
        "over_by": total - limit,
        "bytes_per_device": sizes,
        "largest": arguments[:LARGEST],
        "compiled_flops_per_step": None,
        "collectives": [],
        "roofline_seconds": None,
        "bound_by": "memory capacity",
    }


def _needed_and_available(message: str, arguments: int, limit: int) -> tuple[int, int]:
    """Returns the bytes per device that a program needs and that exist, from XLA's message."""
    amount = r"([\d.]+)([KMGT]?)B?"
    for pattern, beside in (
        (rf"Used {amount} of {amount} hbm", 0),
        (rf"temporaries \({amount}\) exceeds available HBM \({amount}\)", arguments),
        (rf"allocating {amount}", 0),  # on a GPU
    ):
        if match := re.search(pattern, message):
            used, *available = re.findall(amount, match[0])
            total, *limits = (int(float(n) * UNITS[unit]) for n, unit in (used, *available))
            return total + beside, limits[0] if limits else limit
    raise BadInput(f"the compiler refuses this program: {message.splitlines()[0][:300]}")


def _arguments(training: Training, state) -> list[dict]:
    """Returns every array of state, batch and companions, with its bytes on a device, the largest
    first."""
    leaves = leaves_by_path(
        {"state": state, "batch": training.abstract_batch()} | training.abstract_companions()
    )
    rows = []
    for path, leaf in leaves.items():
        spec = getattr(leaf.sharding, "spec", None)
        local = leaf.sharding.shard_shape(leaf.shape) if spec is not None else leaf.shape
        size, sharding = math.prod(local) * leaf.dtype.itemsize, str(tuple(spec or ()))
        rows.append(_array(path, "argument", leaf.shape, leaf.dtype, sharding, size))
    return sorted(rows, key=lambda row: -row["bytes"])


def _temporaries(program: Program) -> list[dict]:
    """Returns the largest results of instructions that are in HBM, one of each shape."""
    rows = {}
    for i, *_ in program.unfused():
        match = re.match(r"(\w+)\[([\d,]+)\]", i.type)
        skipped = ("parameter", "get-tuple-element", "bitcast", "while", "constant")
        if match and VMEM not in i.type and i.opcode not in skipped and match[0] not in rows:
            name, shape = i.source or i.name, map(int, match[2].split(","))
            rows[match[0]] = _array(name, "temporary", shape, match[1], "of one device", i.bytes)
    return sorted(rows.values(), key=lambda row: -row["bytes"])[:LARGEST]


def _array(name: str, kind: str, shape, dtype, sharding: str, size: int) -> dict:
    row = {"name": name, "kind": kind, "shape": list(shape), "dtype": str(dtype)}
    return row | {"sharding": sharding, "bytes": size}


def _kernel_flops(program: Program, training: Training) -> int:
    """Returns the FLOPs of splash's and cuDNN's kernels, whose cost is not in the program: for each
    matrix product, pairs of positions (the mean over the layers) times the head width."""
    cfg, mesh = training.spec.model, training.mesh.shape
    rows = training.config.batch_size // training.config.grad_accum
    rows //= math.prod(mesh[axis] for axis in BATCH_AXES)
    width = cfg.head_dim * cfg.num_heads // mesh["tensor"]
    hops = mesh["context"] if method_of(training.config, mesh) == "ring" else 1
    one = 2 * int(np.mean(_pairs(cfg))) * width * rows // (mesh["context"] * hops)
    total = 0
    for name, times in program.kernels().items():
        kind = next((kind for kind in MATMULS if f"_{kind}" in name), None)
        total += times * one * MATMULS.get(kind, 0)
    return total


def _pairs(cfg: ModelConfig) -> list[int]:
    """Returns how many pairs of positions each attention of a model has, or of a repeating pattern
    of its layers."""

    def seen(length: int, window: int, causal: bool) -> int:
        if pattern := patterns_of(cfg)[causal]:
            return round(length * keys_seen(pattern, length, causal))
        before = int(np.minimum(np.arange(1, length + 1), window or length).sum())
        return before if causal else 2 * before - length

    def stack(length: int, causal: bool) -> list[int]:
        return [seen(length, window, causal) for window in layer_windows(cfg)]

    if cfg.kind != "encoder_decoder":
        return stack(cfg.max_seq_len, cfg.kind == "decoder")
    period = len(layer_windows(cfg))
    cross = [cfg.max_seq_len * cfg.max_source_len] * period
    decoder = (stack(cfg.max_seq_len, True) + cross) * (cfg.num_layers // period)
    return stack(cfg.max_source_len, False) * (cfg.encoder_layers // period) + decoder


def _volume(c: Collective) -> float:
    """Returns the bytes that a ring sends from each device (arXiv:1909.09756, section 2)."""
    around = (len(c.group) - 1) / len(c.group)
    factor = {"all-reduce": 2 * around, "collective-permute": 1.0}.get(c.kind, around)
    return c.count * c.bytes * factor


def _table(collectives: list[Collective]) -> list[dict]:
    """Returns a row per kind and axis: how often they run in a step, and their bytes together."""
    rows: dict[tuple, dict] = {}
    for c in collectives:
        empty = {"kind": c.kind, "axis": c.axis, "count": 0, "bytes": 0}
        row = rows.setdefault((c.kind, c.axis), empty)
        row["count"] += c.count
        row["bytes"] += c.count * c.bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])
