"""Whether a state can fit the memory there is, said before any of it is allocated."""

import math
import os
import re
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxgpt.checkpointing.checkpoints import concrete
from jaxgpt.system.errors import BadInput
from jaxgpt.training.state import TrainState

GIB = 2**30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # a container's; "max" where there is none
MEMINFO = Path("/proc/meminfo")


def check_memory(state: TrainState, mesh: Mesh, companions: dict | None = None) -> None:
    """Raises `BadInput`, with the bytes, where the abstract `state` and the parameters of
    `companions` alone cannot fit.

    That is certain: training needs gradients and activations besides. `plan` counts those too. Call
    it under `jax.set_mesh(mesh)`.
    """
    device, each = mesh.local_devices[0], 0
    for leaf in jax.tree.leaves(concrete((state, companions))):
        each += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    there = (device.memory_stats() or {}).get("bytes_limit")
    needed, of = each, f"a {device.device_kind}"
    if device.platform == "cpu":  # which all devices of this host share
        needed, there, of = each * len(mesh.local_devices), host_bytes(), "this machine"
    if there and needed > there:
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
        raise BadInput(
            f"the model does not fit: its {parameters:,} parameters and their optimizer state take"
            f" {each:,} bytes ({each / GIB:,.1f} GiB) a device, {needed:,} in all here, and {of}"
            f" has {there:,}; make model.num_layers or model.embed_dim smaller, or split it with"
            " mesh.fsdp over more devices"
        )


def host_bytes() -> int:
    """Returns the memory that this machine or container has, swap included."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.exists() and (text := CGROUP_LIMIT.read_text().strip()).isdecimal():
        physical = min(physical, int(text))
    text = MEMINFO.read_text() if MEMINFO.exists() else ""
    swap = re.search(r"^SwapTotal: *(\d+) kB", text, re.MULTILINE)
    return physical + (int(swap[1]) * 1024 if swap else 0)
