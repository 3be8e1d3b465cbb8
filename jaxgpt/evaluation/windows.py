"""The windows in which an evaluation reads a split."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config.schema import IGNORE


def evaluation_windows(num_tokens: int, seq_len: int, stride: int) -> int:
    """Returns how many windows, `stride` tokens apart, cover every target of a split."""
    return 1 + max(0, -(-(num_tokens - 1 - seq_len) // stride))


def evaluation_batch(
    tokens: np.ndarray,
    seq_len: int,
    batch_size: int,
    k: int,
    mask: np.ndarray | None = None,
    stride: int = 0,
) -> dict[str, np.ndarray]:
    """Returns windows k*batch_size .. of a split, in order, int32 [1, batch_size, seq_len].

    Windows are `stride` tokens apart (0: seq_len). A target counts in the first window that
    contains it; elsewhere, past the end and where `mask` is 0 the target is IGNORE.
    """
    stride = stride or seq_len
    inputs = np.zeros((batch_size, seq_len), np.int32)
    targets = np.full((batch_size, seq_len), IGNORE, np.int32)
    for row in range(batch_size):
        start = (k * batch_size + row) * stride
        window = np.asarray(tokens[start : start + seq_len + 1]).astype(np.int32)
        count = max(len(window) - 1, 0)
        known = seq_len - stride if start else 0
        inputs[row, :count] = window[:-1]
        targets[row, known:count] = window[1 + known :]
        if mask is not None:
            counted = np.asarray(mask[start + 1 : start + 1 + count])
            targets[row, :count] = np.where(counted, targets[row, :count], IGNORE)
    return {"inputs": inputs[None], "targets": targets[None]}


def on_devices(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Returns the batch, of which every process has all rows, as sharded arrays."""
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in batch.items()
    }
