"""Masked language modelling (BERT, arXiv:1810.04805, section 3.1 and appendix A.1).

A share `rate` of each row's tokens is chosen, and is what the model finds again. Of the chosen
80% are replaced by [MASK], 10% by random tokens, and 10% stay:

    inputs    the  cat  [MASK]  on  the  blue
    targets    .    .    sat    .    .    mat

Special tokens and padding are never chosen. A row is drawn anew each time it comes (dynamic
masking, RoBERTa, arXiv:1907.11692).
"""

from typing import NamedTuple

import numpy as np

from jaxgpt.config.schema import IGNORE
from jaxgpt.denoising.draws import ranks, uniforms

CHOICE, ACTION, REPLACEMENT, ROUNDING = range(4)  # purposes of draws


class Masking(NamedTuple):
    """How tokens are chosen and replaced: by `mask`, or by one of `ordinary`, the ids of text."""

    mask: int
    ordinary: np.ndarray
    rate: float = 0.15
    mask_share: float = 0.8  # of the chosen
    random_share: float = 0.1


def choose(
    allowed: np.ndarray, rate: float, seed: int, rows: np.ndarray, starts: np.ndarray | None = None
) -> np.ndarray:
    """Returns which tokens are chosen: of each row's `allowed` [n, T] the share `rate`, rounded up
    or down at random so that it is `rate` on average; bool [n, T].

    With `starts` [n, T], which tokens begin a word, a word is chosen whole: the words in random
    order, each that still fits, as BERT's whole-word masking does.
    """
    rounding = uniforms(seed, rows, 1, ROUNDING)[:, 0]
    wanted = (rate * allowed.sum(1) + rounding).astype(np.int64)
    if starts is None:
        return allowed & (ranks(seed, rows, allowed, CHOICE) < wanted[:, None])
    count, length = allowed.shape
    is_start = starts | ~allowed | ~np.pad(allowed, ((0, 0), (1, 0)))[:, :-1]
    word = np.cumsum(is_start, axis=1) - 1
    flat = (np.arange(count)[:, None] * length + word).ravel()
    sizes = np.bincount(flat, allowed.ravel(), count * length).reshape(count, length)
    order = np.argsort(ranks(seed, rows, sizes > 0, CHOICE), axis=1)
    taken = _fill(np.take_along_axis(sizes, order, 1).astype(np.int64), wanted)
    is_taken = np.zeros_like(taken)
    np.put_along_axis(is_taken, order, taken, axis=1)
    return is_taken.ravel()[flat].reshape(count, length)


def _fill(sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns which words are taken, in each row those that do not exceed what is `wanted`."""
    taken, filled = np.zeros(sizes.shape, bool), np.zeros(len(sizes), np.int64)
    for place in range(sizes.shape[1]):
        size = sizes[:, place]
        fits = (size > 0) & (filled + size <= wanted)
        taken[:, place] = fits
        filled += size * fits
        if (filled == wanted).all() or not size.any():
            break
    return taken


def mask_tokens(
    tokens: np.ndarray, chosen: np.ndarray, how: Masking, seed: int, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns `inputs` and `targets`, int32 [n, T], of `tokens` [n, T] and those `chosen`."""
    action = uniforms(seed, rows, tokens.shape[1], ACTION)
    which = uniforms(seed, rows, tokens.shape[1], REPLACEMENT) * len(how.ordinary)
    replacement = how.ordinary[which.astype(np.int64)]
    is_random = chosen & (action >= how.mask_share)
    inputs = np.where(chosen & (action < how.mask_share), how.mask, tokens)
    inputs = np.where(is_random & (action < how.mask_share + how.random_share), replacement, inputs)
    targets = np.where(chosen, tokens, IGNORE)
    return {"inputs": inputs.astype(np.int32), "targets": targets.astype(np.int32)}
