"""A plan: what one update of a config needs on given devices, and how long it takes at least."""

import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.config import Config
from jaxgpt.config.schema import BATCH_AXES, SPLIT_BY
from jaxgpt.model.flops import flops_per_token
from jaxgpt.model.gpt import count_parameters, windows
from jaxgpt.parallel.mesh import AXES, make_mesh
from jaxgpt.planning.hardware import Chip, quiet
from jaxgpt.planning.program import FUSIONS, VMEM, Collective, Program
from jaxgpt.system.errors import BadInput
from jaxgpt.training.setup import Training, make_training

PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "bwd": 5}  # of matrices in splash's and cuDNN's kernels
LARGEST = 10
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make_plan(config: Config, devices: list, chip: Chip | None) -> dict[str, Any]:
    """Returns the contract's figures (but for the topology's name and advice) for the update of a
    config whose vocabulary is resolved; `fits` is false where the compiler runs out of memory.

    Raises:
      BadInput: if config and devices do not go together.
    """
    began = time.perf_counter()
    with jax.set_mesh(mesh := make_mesh(config, devices)):
        training = make_training(config, mesh)
        state = training.abstract_state()
        plan = {
            "devices": len(devices),
            "parameters": count_parameters(state.params, training.spec.model),
            "mesh": dict(zip(AXES, mesh.devices.shape, strict=True)),
            "attention": training.spec.kernel,
        }
        arguments = _arguments(training, state)
        try:
            compiled, program = _compiled(training)
        except jax.errors.JaxRuntimeError as e:
            memory = {"arguments": sum(a["bytes"] for a in arguments)}
            memory["total"], memory["limit"] = _too_large(str(e), chip, memory["arguments"])
            memory["temporaries"] = memory["total"] - memory["arguments"]
            measured = _empty(memory, arguments)
        else:
            memory = _memory(compiled, chip)
            measured = _measured(program, memory, arguments, training, chip)
    tokens = config.batch_size * config.model.max_seq_len
    plan |= measured | {"flops_per_step": tokens * flops_per_token(training.spec.model)}
    return plan | {"tokens_per_step": tokens, "compile_seconds": time.perf_counter() - began}


def _compiled(training: Training) -> tuple[Any, Program]:
    """Returns the compiled step and its program; a TPU's as XLA writes it while compiling: read
    back from the executable, some of them fail a check."""
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
        return compiled, Program(compiled.as_text())
    with tempfile.TemporaryDirectory() as folder, quiet():
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = training.compile_step(options)
        (file,) = Path(folder).glob("*jit_train_step*after_optimizations.txt")
        return compiled, Program(file.read_text())


def _empty(memory: dict, arguments: list[dict]) -> dict:
    return {
        "fits": False,
        "over_by": memory["total"] - memory["limit"],
        "bytes_per_device": memory,
        "largest": arguments[:LARGEST],
        "compiled_flops_per_step": None,
        "collectives": [],
        "roofline_seconds": None,
        "bound_by": "memory capacity",
    }


def _measured(
    program: Program, memory: dict, arguments: list[dict], training: Training, chip: Chip | None
) -> dict:
    mesh = training.mesh
    flops = program.flops() + _kernel_flops(program, training)
    collectives = program.collectives(AXES, mesh.devices.shape)
    roofline = chip and {
        "compute": flops / chip.flops,
        "memory": program.hbm_bytes() / chip.hbm_bandwidth,
        "network": sum(
            chip.seconds(_volume(c), [mesh.devices.flat[at] for at in c.group]) for c in collectives
        ),
    }
    limit = memory["limit"]
    return {
        "fits": limit is None or memory["total"] <= limit,
        "bytes_per_device": memory,
        "largest": sorted(arguments + _temporaries(program), key=lambda a: -a["bytes"])[:LARGEST],
        "compiled_flops_per_step": flops * mesh.size,
        "collectives": _summed(collectives),
        "roofline_seconds": roofline,
        "bound_by": roofline and max(roofline, key=roofline.get),
    }


def _memory(compiled, chip: Chip | None) -> dict:
    found = compiled.memory_analysis()
    kept = found.argument_size_in_bytes - found.alias_size_in_bytes + found.output_size_in_bytes
    return {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "total": kept + found.temp_size_in_bytes + found.generated_code_size_in_bytes,
        "limit": chip and chip.hbm,
    }


def _too_large(message: str, chip: Chip | None, arguments: int) -> tuple[int, int]:
    """Returns the bytes of a device that the compiler says it would need, and those that there are.

    Raises:
      BadInput: if it failed for another reason.
    """
    amount = r"([\d.]+)([KMGT]?)B?"
    for pattern, beside in (
        (rf"Used {amount} of {amount} hbm", 0),
        (rf"temporaries \({amount}\) exceeds available HBM \({amount}\)", arguments),
    ):
        if used := re.search(pattern, message):
            total, limit = float(used[1]) * UNITS[used[2]], float(used[3]) * UNITS[used[4]]
            return int(total) + beside, int(limit)
    if used := re.search(rf"allocating {amount}", message):  # a GPU's
        return int(float(used[1]) * UNITS[used[2]]), chip.hbm if chip else 0
    raise BadInput(f"the compiler refuses this program: {message.splitlines()[0][:300]}")


def _arguments(training: Training, state) -> list[dict]:
    """Every array of state and batch, the largest first: shape, sharding, bytes on a device."""
    leaves = jax.tree_util.tree_leaves_with_path((state, training.abstract_batch()))
    found = []
    for path, leaf in leaves:
        spec = getattr(leaf.sharding, "spec", None)
        local = leaf.sharding.shard_shape(leaf.shape) if spec is not None else leaf.shape
        found.append(
            {
                "name": _named(path),
                "kind": "argument",
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "sharding": str(tuple(spec or ())),
                "bytes": math.prod(local) * leaf.dtype.itemsize,
            }
        )
    return sorted(found, key=lambda a: -a["bytes"])


def _named(path) -> str:
    root, *rest = path
    names = (str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in rest)
    return "/".join((["state"] if root.idx == 0 else ["batch"]) + list(names))


def _temporaries(program: Program) -> list[dict]:
    """The largest arrays that instructions make outside the chip, once for each shape."""
    found = {}
    fused = {i.called("calls") for i, _, _ in program if i.opcode in FUSIONS}
    for name, computation in program.computations.items():
        if not program.runs[name] or name in fused:
            continue
        for i in computation.values():
            shape = re.match(r"(\w+)\[([\d,]+)\]", i.type)
            skipped = ("parameter", "get-tuple-element", "bitcast", "while", "constant")
            if shape and VMEM not in i.type and i.opcode not in skipped:
                found.setdefault(
                    shape[0],
                    {
                        "name": i.source or i.name,
                        "kind": "temporary",
                        "shape": [int(n) for n in shape[2].split(",")],
                        "dtype": shape[1],
                        "sharding": "of one device",
                        "bytes": i.bytes,
                    },
                )
    return sorted(found.values(), key=lambda a: -a["bytes"])[:LARGEST]


def _kernel_flops(program: Program, training: Training) -> int:
    """Splash and cuDNN say nothing of their cost: pairs of positions that see each other, the mean
    over the layers' windows, times the width of a head, for each product of matrices."""
    cfg, mesh = training.spec.model, training.mesh.shape
    rows = training.config.batch_size // training.config.grad_accum
    rows //= math.prod(mesh[axis] for axis in BATCH_AXES)
    seen = [
        np.minimum(np.arange(1, cfg.max_seq_len + 1), w or cfg.max_seq_len).sum()
        for w in windows(cfg)
    ]
    one = 2 * int(np.mean(seen)) * cfg.head_dim * cfg.num_heads // mesh[SPLIT_BY["heads"]] * rows
    total = 0
    for name, times in program.kernels().items():
        kind = next((kind for kind in PRODUCTS if f"_{kind}" in name), None)
        total += times * one * PRODUCTS.get(kind, 0)
    return total


def _volume(c: Collective) -> float:
    """The bytes that a ring sends from each device (arXiv:1909.09756, section 2)."""
    around = (len(c.group) - 1) / len(c.group)
    factor = {"all-reduce": 2 * around, "collective-permute": 1.0}.get(c.kind, around)
    return c.count * c.bytes * factor


def _summed(collectives: list[Collective]) -> list[dict]:
    """The contract's rows: how often in a step, and their bytes together."""
    found: dict[tuple, dict] = {}
    for c in collectives:
        row = found.setdefault(
            (c.kind, c.axis), {"kind": c.kind, "axis": c.axis, "count": 0, "bytes": 0}
        )
        row["count"] += c.count
        row["bytes"] += c.count * c.bytes
    return sorted(found.values(), key=lambda row: -row["bytes"])
