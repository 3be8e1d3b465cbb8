"""Span corruption (T5, arXiv:1910.10683, section 3.1.4 and appendix B of its code).

Spans of a row are replaced by sentinels, and the decoder writes what each stood for:

    row       thank you for inviting me to your party last week
    sources   thank you <extra_id_0> me to your party <extra_id_1> week </s>
    targets   <extra_id_0> for inviting <extra_id_1> last </s>

A row begins with text and ends with a span. Every row of a length has as many spans and as much
noise, so the arrays have no padding.
"""

from typing import NamedTuple

import numpy as np

from jaxgpt.denoising.draws import ranks

NOISE, TEXT = range(2)  # purposes of draws


class Lengths(NamedTuple):
    """Of a row: its tokens, those that are noise, the spans of noise, and what sources and targets
    are long, their end included."""

    tokens: int
    noise: int
    spans: int
    sources: int
    targets: int


def lengths_of(tokens: int, density: float, mean_length: float) -> Lengths:
    """Returns the lengths of a row of `tokens`, with noise on a share `density` of them, in spans
    of `mean_length` on average."""
    noise = min(max(round(tokens * density), 1), tokens - 1)
    spans = min(max(round(noise / mean_length), 1), tokens - noise)
    return Lengths(tokens, noise, spans, tokens - noise + spans + 1, noise + spans + 1)


def longest(source_len: int, density: float, mean_length: float) -> Lengths:
    """Returns the lengths of the longest row whose sources fill at most `source_len`, as T5's
    `compute_input_and_target_lengths` finds it."""
    tokens = max(source_len, 2)
    while lengths_of(tokens + 1, density, mean_length).sources <= source_len:
        tokens += 1
    lengths = lengths_of(tokens, density, mean_length)
    if density == 0.5 and lengths.targets > lengths.sources:
        return lengths_of(tokens - 1, density, mean_length)
    return lengths


def noise_mask(lengths: Lengths, seed: int, rows: np.ndarray) -> np.ndarray:
    """Returns which tokens are noise; bool [n, tokens]. The noise and the text are each cut into
    `spans` parts, every way to cut them as likely, and alternate, text first (T5's
    `random_spans_noise_mask`)."""
    text = lengths.tokens - lengths.noise
    parts = np.stack(
        [
            _random_parts(text, lengths.spans, seed, rows, TEXT),
            _random_parts(lengths.noise, lengths.spans, seed, rows, NOISE),
        ],
        axis=2,
    ).reshape(len(rows), -1)
    is_start = np.zeros((len(rows), lengths.tokens + 1), np.int64)
    np.put_along_axis(is_start, np.cumsum(parts, axis=1), 1, axis=1)
    return np.cumsum(is_start, axis=1)[:, :-1] % 2 == 1


def _random_parts(items: int, parts: int, seed: int, rows: np.ndarray, purpose: int) -> np.ndarray:
    """Returns the sizes, at least 1, of `parts` that `items` are cut into; [n, parts]."""
    gaps = ranks(seed, rows, np.ones((len(rows), items - 1), bool), purpose) < parts - 1
    cuts = np.nonzero(gaps)[1].reshape(len(rows), parts - 1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=items)


def corrupt_spans(
    tokens: np.ndarray, noise: np.ndarray, sentinels: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (sources, targets) of `tokens` [n, tokens]: noise, then text, replaced by sentinels,
    a span by one, and closed by `end`; int32."""
    return _replaced(tokens, noise, sentinels, end), _replaced(tokens, ~noise, sentinels, end)


def _replaced(tokens, hidden, sentinels, end) -> np.ndarray:
    first = hidden & ~np.pad(hidden, ((0, 0), (1, 0)))[:, :-1]
    number = np.cumsum(first, axis=1) - 1
    kept = np.where(first, sentinels[np.maximum(number, 0)], tokens)[first | ~hidden]
    kept = kept.reshape(len(tokens), -1)
    return np.pad(kept, ((0, 0), (0, 1)), constant_values=end).astype(np.int32)
