"""What the processes of a run must agree on."""

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.config import BadInput


def check_same(value: str, what: str) -> None:
    """Raises `BadInput` on every process if `value` differs between any two; `what` names it."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.uint32)
    every = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(mine))
    if differing := [i for i, other in enumerate(every) if (other != every[0]).any()]:
        raise BadInput(
            f"{what} of process(es) {', '.join(map(str, differing))} differs from that of process"
            " 0; give all hosts the same files and the same command"
        )
