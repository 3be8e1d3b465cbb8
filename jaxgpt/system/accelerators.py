"""Accelerators that this machine lacks: their libraries, if installed, stay out of the way."""

import contextlib
import glob
import importlib.util
import os
import sys
from logging import LogRecord, getLogger
from pathlib import Path

TPU_FILES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
NVIDIA_FILES = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg")  # also in containers and WSL
PCI = "/sys/bus/pci/devices"
GOOGLE = "0x1ae0"
DISKS_AND_NETWORK_CARDS = ("0x01", "0x02")  # PCI classes, which Google's virtual machines have too


def has_tpu_files() -> bool:
    """Says whether this machine, or container, has the device file of a TPU."""
    return any(map(glob.glob, TPU_FILES))


def leave_out_absent() -> None:
    """Keeps libraries for accelerators that are not here from writing to stderr; call it before JAX
    is imported.

    JAX then finds no libtpu, which would write five lines, and no CUDA plugin, which would load
    300 MB of libraries and report with a traceback that it cannot start. What is here, or asked for
    by JAX_PLATFORMS, stays as it is, with its errors.
    """
    asked_for = os.environ.get("JAX_PLATFORMS", "")
    if not (has_tpu_files() or _has_tpu_on_bus() or "tpu" in asked_for):
        sys.modules.setdefault("libtpu", None)  # as if it were not installed
    asks_for_cuda = "cuda" in asked_for or "gpu" in asked_for
    if not any(map(glob.glob, NVIDIA_FILES)) and not asks_for_cuda:
        for name in _cuda_plugins():
            sys.modules.setdefault(name, None)
        getLogger("jax._src.xla_bridge").addFilter(_without_cuda_plugin)


def allow_absent() -> None:
    """Undoes `leave_out_absent`, to compile for accelerators that are not here; call it before JAX
    looks for devices."""
    for name in ("libtpu", *_cuda_plugins()):
        if sys.modules.get(name, ...) is None:
            del sys.modules[name]


def _cuda_plugins() -> list[str]:
    """Returns the modules of JAX's plugins for CUDA that are installed; imports nothing."""
    spec = importlib.util.find_spec("jax_plugins")
    folders = (spec and spec.submodule_search_locations) or ()
    files = (file for folder in folders for file in Path(folder).glob("xla_cuda*"))
    return [f"jax_plugins.{file.stem}" for file in files]


def _has_tpu_on_bus() -> bool:
    """Says whether a TPU is on the PCI bus; a container may see it without its device file."""
    with contextlib.suppress(OSError):  # unreadable: no command fails for that
        return any(
            vendor.read_text().strip() == GOOGLE
            and not (vendor.parent / "class").read_text().startswith(DISKS_AND_NETWORK_CARDS)
            for vendor in Path(PCI).glob("*/vendor")
        )
    return False


def _without_cuda_plugin(record: LogRecord) -> bool:
    return "jax_plugins.xla_cuda" not in record.getMessage()
