"""Prefix language modelling (arXiv:1910.10683, section 3.2.1): a row is cut at a random place; its
start is read in both directions, and the rest is predicted left to right."""

import numpy as np

from jaxgpt.config.schema import IGNORE
from jaxgpt.denoising.draws import integers


def split_rows(arrays: dict[str, np.ndarray], seed: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns a decoder's `arrays` (`inputs`, `targets` [n, T], ...) with `prefix` [n], the length
    of each row's prefix, and no targets inside it. Every length from 1 to all tokens but one is as
    likely; the prefix's last token predicts the first after it."""
    targets = arrays["targets"]
    place = np.arange(targets.shape[1])
    filled = np.where(targets != IGNORE, place + 1, 0).max(1)  # what is behind is padding
    prefix = integers(seed, rows, 1, np.maximum(filled, 1)).astype(np.int32)
    targets = np.where(place >= prefix[:, None] - 1, targets, IGNORE).astype(np.int32)
    return arrays | {"targets": targets, "prefix": prefix}
