"""The windows in which an evaluation reads a split."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.data.chunks import next_token


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
    start = (k * batch_size + np.arange(batch_size))[:, None] * stride
    position = start + np.arange(seq_len + 1)
    has_target = position[:, 1:] < len(tokens)
    position = np.minimum(position, len(tokens) - 1)
    window = np.asarray(tokens[position]).astype(np.int32)
    is_new = (start == 0) | (np.arange(seq_len) >= seq_len - stride)
    is_target = has_target & is_new
    if mask is not None:
        is_target &= np.asarray(mask[position[:, 1:]]) != 0
    batch = next_token(window, is_target)
    batch["inputs"] = np.where(has_target, batch["inputs"], 0)
    return {name: values[None].astype(np.int32) for name, values in batch.items()}


def on_devices(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Returns the batch, of which every process has all rows, as sharded arrays."""
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in batch.items()
    }
