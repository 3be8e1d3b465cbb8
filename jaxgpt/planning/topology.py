"""How accelerators to plan for are named. Needs no JAX, so that a wrong name is said at once."""

import re

from jaxgpt.system.errors import BadInput

TPUS, GPUS = ("v5e", "v5p", "v6e"), ("a100", "h100", "h200")


def check_topology(topology: str) -> None:
    """Raises `BadInput` if `topology` is neither a TPU slice (`v5e:2x4`) nor GPUs (`h200`, `h200:8`
    in one host, `h200:2x8` in two); "" are this machine's devices."""
    name, _, shape = topology.partition(":")
    is_gpus = name in GPUS and re.fullmatch(r"(?:[1-9]\d*x)?[1-9]\d*", shape or "1")
    is_slice = name in TPUS and re.fullmatch(r"\d+(x\d+){0,2}", shape)
    if topology and not is_gpus and not is_slice:
        raise BadInput(
            f"--topology={topology} is not GENERATION:SHAPE of TPUs, as in v5e:2x4 or v5p:2x2x2"
            f" ({', '.join(TPUS)}), nor GPUs as in h200, h200:8 or, hosts x GPUs, h200:2x8"
            f" ({', '.join(GPUS)})"
        )


def check_slices(topology: str, slices: int, bandwidth: float) -> None:
    """Raises `BadInput` if there cannot be so many slices, or a chip cannot send so many GB/s to
    other slices."""
    if slices < 1:
        raise BadInput(f"--slices={slices} must be at least 1")
    if slices > 1 and topology.partition(":")[0] not in TPUS:
        raise BadInput(
            f"--slices={slices} needs a --topology of TPUs, that of one slice, as in v5p:4x4x4;"
            " hosts of GPUs are written h200:2x8"
        )
    if not 0 <= bandwidth < float("inf"):
        raise BadInput(f"--slice_bandwidth={bandwidth} must be a number of GB/s, 0 for the default")
    if bandwidth and slices == 1:
        raise BadInput(f"--slice_bandwidth={bandwidth} needs several --slices")
