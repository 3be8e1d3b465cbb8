"""Whether a state can fit the memory there is, said before any of it is allocated."""

import math
import os
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding

from jaxgpt.system.errors import BadInput
from jaxgpt.training.state import TrainState

GIB = 2**30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # a container's; "max" where there is none
MEMINFO = Path("/proc/meminfo")


def check_memory(state: TrainState, mesh: Mesh) -> None:
    """Raises `BadInput`, with the bytes, where the abstract `state` alone cannot fit.

    That is certain: training needs gradients and activations besides. `plan` counts those too.
    """
    device = mesh.local_devices[0]
    each, there = state_bytes(state, mesh), (device.memory_stats() or {}).get("bytes_limit")
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


def state_bytes(state: TrainState, mesh: Mesh) -> int:
    """Returns the bytes of an abstract state that each device of `mesh` holds."""

    def size(leaf) -> int:
        spec = leaf.sharding.spec if leaf.sharding else jax.P()
        return math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(state)))


def host_bytes() -> int:
    """Returns the memory that this machine or container has, swap included."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.exists() and (text := CGROUP_LIMIT.read_text().strip()).isdecimal():
        physical = min(physical, int(text))
    swap = [line.split()[1] for line in _lines(MEMINFO) if line.startswith("SwapTotal:")]
    return physical + sum(int(kilobytes) * 1024 for kilobytes in swap)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
