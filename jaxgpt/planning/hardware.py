"""The accelerators that can be planned for, and their devices described without the hardware."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from jaxgpt.parameters.flops import PEAK_FLOPS
from jaxgpt.planning.gpus import GIB, GPUS, describe_gpus
from jaxgpt.planning.topology import check_topology
from jaxgpt.system.accelerators import allow_absent
from jaxgpt.system.errors import BadInput
from jaxgpt.system.extras import require

LIBTPU_ENVIRONMENT = {  # or libtpu looks for a metadata server for minutes, and logs a lot
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "",
    "TPU_WORKER_HOSTNAMES": "",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling uses no device that another process may hold
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do; bandwidths are in bytes/s."""

    flops: float  # FLOP/s in bfloat16
    hbm_bandwidth: float
    network: float  # sent over a torus axis, both directions together; of a GPU: inside its host
    hbm: int  # bytes that a program may use
    between: float  # sent to other slices of TPUs, to other hosts of GPUs
    joins: str = "slice_index"  # what `between` lies between, as an attribute of a device

    def seconds(self, sent: float, group: list) -> float:
        """Returns the least seconds that a collective takes if each of `group` sends `sent` bytes.

        TPUs send over every torus axis along which the group extends. What leaves a slice or a host
        goes through the network cards of all the group's devices in it.
        """
        places = [getattr(device, self.joins, 0) for device in group]
        parts = len(set(places))
        across = sent / self.between / (len(group) / parts) if parts > 1 else 0.0
        inside = [d for d, place in zip(group, places, strict=True) if place == places[0]]
        coordinates = zip(*(getattr(device, "coords", ()) for device in inside), strict=True)
        axes = sum(len(set(along)) > 1 for along in coordinates)
        return max(sent / self.network / max(1, axes) if len(inside) > 1 else 0.0, across)


# From Google's pages on each generation's system architecture, also the data-centre network: 6.4
# and 25.6 Tb/s for 256 chips of v5e and v6e, 50 Gb/s for a chip of v5p. Memory as libtpu reports
# it. No v4: its topology counts its two cores as devices, a v4 itself does not, and this was not
# tried on one.
TPUS = {
    "v5e": Chip(PEAK_FLOPS["TPU v5e"], 0.82e12, 2 * 50e9, int(15.75 * GIB), 3.125e9),
    "v5p": Chip(PEAK_FLOPS["TPU v5p"], 2.77e12, 2 * 100e9, int(95.73 * GIB), 6.25e9),
    "v6e": Chip(PEAK_FLOPS["TPU v6e"], 1.64e12, 2 * 100e9, int(31.24 * GIB), 12.5e9),
}
KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # JAX's `device_kind`
KINDS |= {f"TPU {name}": name for name in TPUS}


def gpu_chip(name: str) -> Chip:
    """Returns `GPUS[name]` with the share of its memory that JAX uses: 75%, or what the environment
    variable XLA_PYTHON_CLIENT_MEM_FRACTION says. Raises `BadInput` if that is not a number."""
    gpu, share = GPUS[name], os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
    if not re.fullmatch(r"\d*\.?\d+", share):
        raise BadInput(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={share} is not a share of memory, as in 0.92"
        )
    memory, nvlink = int(gpu.memory * GIB * float(share)), gpu.links * 25e9
    peak, card = PEAK_FLOPS[gpu.kind], gpu.card * 1e9
    return Chip(peak, gpu.bandwidth * 1e9, nvlink, memory, card, "process_index")


def devices_of(topology: str, slices: int = 1) -> tuple[list, Chip | None]:
    """Returns the devices of so many TPU slices (`v5e:2x4`) or of described GPUs (`h200`, `h200:8`
    in one host, `h200:2x8` in two), and their chip.

    An empty `topology` means this machine's devices; their chip is None if it is unknown.

    Raises:
      BadInput: if there are no such devices, or the compiler for them is not installed.
    """
    if not topology:
        device = jax.devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        return jax.devices(), local_chip(device.device_kind, limit)
    check_topology(topology)
    allow_absent()
    name, _, shape = topology.partition(":")
    if name in GPUS and (sizes := re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape or "1")):
        with quiet():
            return describe_gpus(name, int(sizes[1] or 1), int(sizes[2])), gpu_chip(name)
    require("libtpu", "plan", "jaxgpt.plan")
    try:
        with quiet():
            several = {"num_slices": slices} if slices > 1 else {}
            devices = topologies.get_topology_desc(topology, platform="tpu", **several).devices
    except Exception as e:
        reason = str(e).splitlines()[0][:200]
        raise BadInput(f"--topology={topology}: libtpu does not know this slice: {reason}") from e
    return list(devices), TPUS[name]


def local_chip(kind: str, limit: int | None) -> Chip | None:
    """Returns the chip of JAX's `device_kind`, None if unknown; `limit`: its memory in bytes."""
    gpu = next((name for name, gpu in GPUS.items() if gpu.kind == kind), None)
    chip = TPUS[KINDS[kind]] if kind in KINDS else gpu and gpu_chip(gpu)
    return dataclasses.replace(chip, hbm=limit) if chip and limit else chip


def use_compilers_alone() -> None:
    """Makes JAX compile without using any device of this machine; call it before `devices_of` with
    a topology."""
    os.environ.update(LIBTPU_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discards what C++ code writes to stderr."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
