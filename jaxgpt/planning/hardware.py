"""The accelerators that can be planned for, and their devices without the hardware."""

import contextlib
import dataclasses
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import topologies

from jaxgpt.config import BadInput
from jaxgpt.config.extras import require
from jaxgpt.metrics.throughput import PEAK_FLOPS

LIBTPU_ENVIRONMENT = {  # or it looks for a metadata server for minutes, and talks
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "", "TPU_WORKER_HOSTNAMES": "",
    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do: FLOP/s in bf16, bytes/s of its memory and of its network one way
    (a TPU's along one axis of the torus, both directions used), and its memory in bytes."""

    flops: float
    hbm_bandwidth: float
    network: float
    hbm: int


GIB = 2**30
# Google's system architecture pages; the memory is what libtpu says a program may use. A v4's
# topology counts its two cores apart, a v4 itself does not: left out until tried on one.
TPUS = {
    "v5e": Chip(PEAK_FLOPS["TPU v5e"], 0.82e12, 2 * 50e9, int(15.75 * GIB)),
    "v5p": Chip(PEAK_FLOPS["TPU v5p"], 2.77e12, 2 * 100e9, int(95.73 * GIB)),
    "v6e": Chip(PEAK_FLOPS["TPU v6e"], 1.64e12, 2 * 100e9, int(31.24 * GIB)),
}
# NVIDIA's data sheets (SXM); the network is NVLink inside one host.
GPUS = {
    "a100": Chip(312e12, 2.04e12, 300e9, 80 * 10**9),
    "h100": Chip(989e12, 3.35e12, 450e9, 80 * 10**9),
    "h200": Chip(989e12, 4.8e12, 450e9, 141 * 10**9),
}


def devices_of(topology: str) -> tuple[list, Chip | None]:
    """Returns the devices of a named slice (`v5e:2x4`) and their chip; this machine's where the
    name is empty, with no chip where its kind is unknown.

    Raises:
      BadInput: if there is no such slice, or libtpu is not installed.
    """
    if not topology:
        return jax.devices(), _local_chip(jax.devices()[0].device_kind)
    generation, _, shape = topology.partition(":")
    if generation not in TPUS or not re.fullmatch(r"\d+(x\d+){0,2}", shape):
        known = ", ".join(TPUS)
        raise BadInput(
            f"--topology={topology} is not GENERATION:SHAPE, as in v5e:2x4 or v5p:2x2x2;"
            f" generations: {known}"
        )
    require("libtpu", "plan", "jaxgpt.plan")
    try:
        with quiet():
            found = topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as e:
        reason = str(e).splitlines()[0][:200]
        raise BadInput(f"--topology={topology}: libtpu knows no such slice ({reason})") from e
    return list(found), TPUS[generation]


def _local_chip(kind: str) -> Chip | None:
    kinds = {
        "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
        "TPU v6 lite": "v6e", "TPU v6e": "v6e",
    }  # fmt: skip
    gpu = next((chip for name, chip in GPUS.items() if name.upper() in kind), None)
    return TPUS[kinds[kind]] if kind in kinds else gpu


@contextlib.contextmanager
def compiler(topology: str) -> Iterator[None]:
    """Holds the only place that libtpu has on a machine, waiting for it, and sets its environment;
    does nothing for the machine's own devices."""
    if not topology:
        yield
        return
    os.environ.update(LIBTPU_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine is none of ours
    place = Path(tempfile.gettempdir()) / f"jaxgpt-libtpu-{os.getuid()}.lock"
    with open(place, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
