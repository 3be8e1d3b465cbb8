"""The accelerators that can be planned for, and their devices without the hardware."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from jaxgpt.model.flops import PEAK_FLOPS
from jaxgpt.planning.gpus import GIB, GPUS, described_gpus
from jaxgpt.system.errors import BadInput
from jaxgpt.system.extras import require

LIBTPU_ENVIRONMENT = {  # or it looks for a metadata server for minutes, and talks
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "",
    "TPU_WORKER_HOSTNAMES": "",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling needs no device that others may hold
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do: FLOP/s in bf16, bytes/s of its memory and of its network one way
    (a TPU's along one axis of the torus, both directions used; a GPU's inside its host), the bytes
    of memory that a program may use, and bytes/s to other hosts (of TPUs: as inside)."""

    flops: float
    hbm_bandwidth: float
    network: float
    hbm: int
    between: float | None = None

    def seconds(self, sent: float, group: list) -> float:
        """Returns how long a collective takes at least in which each device of `group` sends so
        many bytes: over every axis of the torus that the group lies along, or, between hosts,
        through the network cards of all its devices there."""
        if self.between is None:
            places = zip(*(device.coords for device in group), strict=True)
            return sent / self.network / max(1, sum(len(set(along)) > 1 for along in places))
        hosts = len({device.process_index for device in group})
        across = sent / self.between / (len(group) / hosts) if hosts > 1 else 0.0
        return max(sent / self.network, across)


# Google's system architecture pages; the memory is what libtpu says a program may use. A v4's
# topology counts its two cores apart, a v4 itself does not: left out until tried on one.
TPUS = {
    "v5e": Chip(PEAK_FLOPS["TPU v5e"], 0.82e12, 2 * 50e9, int(15.75 * GIB)),
    "v5p": Chip(PEAK_FLOPS["TPU v5p"], 2.77e12, 2 * 100e9, int(95.73 * GIB)),
    "v6e": Chip(PEAK_FLOPS["TPU v6e"], 1.64e12, 2 * 100e9, int(31.24 * GIB)),
}
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
NETWORK_CARD = {"a100": 25e9, "h100": 50e9, "h200": 50e9}  # bytes/s, one a GPU, as in DGX


def gpu_chip(name: str) -> Chip:
    """Returns a GPU of `GPUS`; of its memory, the share that JAX takes: 75%, or what
    XLA_PYTHON_CLIENT_MEM_FRACTION says.

    Raises:
      BadInput: if that is no number.
    """
    gpu, share = GPUS[name], os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
    if not re.fullmatch(r"\d*\.?\d+", share):
        raise BadInput(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={share} is not a share of memory, as in 0.92"
        )
    memory, nvlink = int(gpu.memory * float(share)), gpu.links * 25e9
    return Chip(PEAK_FLOPS[gpu.kind], float(gpu.bandwidth), nvlink, memory, NETWORK_CARD[name])


def devices_of(topology: str) -> tuple[list, Chip | None]:
    """Returns the devices of a slice of TPUs (`v5e:2x4`) or of described GPUs (`h200`, `h200:8` in
    one host, `h200:2x8` in two) and their chip; this machine's where the name is empty, with no
    chip where its kind is unknown.

    Raises:
      BadInput: if there are no such devices, or what compiles for them is not installed.
    """
    if not topology:
        device = jax.devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        return jax.devices(), local_chip(device.device_kind, limit)
    name, _, shape = topology.partition(":")
    if name in GPUS and (sizes := re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape or "1")):
        with quiet():
            return described_gpus(name, int(sizes[1] or 1), int(sizes[2])), gpu_chip(name)
    if name not in TPUS or not re.fullmatch(r"\d+(x\d+){0,2}", shape):
        raise BadInput(
            f"--topology={topology} is not GENERATION:SHAPE of TPUs, as in v5e:2x4 or v5p:2x2x2"
            f" ({', '.join(TPUS)}), nor GPUs as in h200, h200:8 or, hosts x GPUs, h200:2x8"
            f" ({', '.join(GPUS)})"
        )
    require("libtpu", "plan", "jaxgpt.plan")
    try:
        with quiet():
            found = topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as e:
        reason = str(e).splitlines()[0][:200]
        raise BadInput(
            f"--topology={topology}: libtpu does not describe this slice: {reason}"
        ) from e
    return list(found), TPUS[name]


def local_chip(kind: str, limit: int | None) -> Chip | None:
    """Returns the chip of a `device_kind` that is here, with as much memory as it says JAX has."""
    gpu = next((name for name, gpu in GPUS.items() if gpu.kind == kind), None)
    chip = TPUS[KINDS[kind]] if kind in KINDS else gpu and gpu_chip(gpu)
    return dataclasses.replace(chip, hbm=limit) if chip and limit else chip


def use_compilers_alone() -> None:
    """Sets the environment in which JAX compiles for devices that are not here, and uses none that
    are; call it before `devices_of` with a name."""
    os.environ.update(LIBTPU_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what C++ code writes to stderr off the screen."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
