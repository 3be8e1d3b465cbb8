"""Span corruption: T5's lengths and spans, and a row that comes back from its two halves."""

import math

import numpy as np
import pytest

from jaxgpt.denoising.spans import corrupt_spans, lengths_of, longest, noise_mask

ROWS = np.arange(2000)
SENTINELS, END = np.arange(5000, 5100), 4999


def t5_lengths(inputs_length: int, density: float, mean: float) -> tuple[int, int]:
    """(tokens, targets) of a row by the paper's description: text, a sentinel for each span and the
    end fill the inputs; noise, as many sentinels and the end are the targets."""

    def of(tokens):
        noise = round(tokens * density)
        spans = round(noise / mean)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = max(n for n in range(inputs_length, 3 * inputs_length) if of(n)[0] <= inputs_length)
    if density == 0.5 and of(tokens)[1] > of(tokens)[0]:
        tokens -= 1
    return tokens, of(tokens)[1]


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.5, 2.0)])
def test_lengths_are_t5s(density, mean):
    for inputs_length in (64, 128, 500, 512, 1024):
        lengths = longest(inputs_length, density, mean)
        assert (lengths.tokens, lengths.targets) == t5_lengths(inputs_length, density, mean)
    assert longest(512, 0.15, 3.0)[:2] == (568, 85)  # T5's own pre-training: 512 and 114
    assert longest(512, 0.15, 3.0).targets == 114


def test_spans_are_as_long_and_as_many_as_said():
    """Over a million tokens: the density and the mean length within 1%, and each length as often as
    all ways to cut the noise are equally likely: C(noise - n - 1, spans - 2) of
    C(noise - 1, spans - 1)."""
    lengths = longest(1024, 0.15, 3.0)
    noise = noise_mask(lengths, 0, ROWS)
    assert noise.size > 1e6 and abs(noise.mean() / 0.15 - 1) < 0.01
    edges = np.diff(noise.astype(int), axis=1, prepend=0, append=0)
    begins, ends = np.nonzero(edges == 1), np.nonzero(edges == -1)
    sizes = ends[1] - begins[1]
    assert abs(sizes.mean() / 3.0 - 1) < 0.01
    assert (noise.sum(1) == lengths.noise).all() and ((edges == 1).sum(1) == lengths.spans).all()
    assert not noise[:, 0].any() and noise[:, -1].all()
    for size in (1, 2, 3, 6):
        ways = math.comb(lengths.noise - size - 1, lengths.spans - 2)
        share = ways / math.comb(lengths.noise - 1, lengths.spans - 1)
        assert abs((sizes == size).mean() - share) < 0.01 * share + 0.003
    places = noise[:, 50:-50].mean(0)  # anywhere alike; a standard deviation is 0.008
    assert abs(places - 0.15).max() < 0.04


def test_every_way_to_cut_is_as_likely():
    """Of five noise and five other tokens, each in two parts: 4 x 4 masks."""
    lengths = lengths_of(10, 0.5, 2.5)
    assert lengths[:3] == (10, 5, 2)
    masks, counts = np.unique(noise_mask(lengths, 0, np.arange(16_000)), axis=0, return_counts=True)
    assert len(masks) == 16 and abs(counts - 1000).max() < 150


def test_a_row_comes_back_from_sources_and_targets():
    lengths = longest(128, 0.2, 2.5)
    tokens = np.random.default_rng(0).integers(0, 4000, (50, lengths.tokens))
    noise = noise_mask(lengths, 7, ROWS[:50])
    sources, targets = corrupt_spans(tokens, noise, SENTINELS, END)
    assert sources.shape == (50, lengths.sources) and targets.shape == (50, lengths.targets)
    for row in range(50):
        source, target = sources[row].tolist(), targets[row].tolist()
        assert source.pop() == END and target.pop() == END
        sentinels = [t for t in source if t >= 5000]
        assert sentinels == SENTINELS[: lengths.spans].tolist()  # in order, here and there
        assert [t for t in target if t >= 5000] == sentinels and target[0] == sentinels[0]
        spans = np.split(target, [i for i, t in enumerate(target) if t >= 5000])[1:]
        filled = [spans[t - 5000][1:].tolist() if t >= 5000 else [t] for t in source]
        assert sum(filled, []) == tokens[row].tolist()


def test_a_row_is_drawn_alike_in_any_company():
    lengths = longest(128, 0.15, 3.0)
    whole, some = noise_mask(lengths, 5, ROWS), np.array([700, 1, 1999])
    assert (noise_mask(lengths, 5, ROWS[some]) == whole[some]).all()
    assert (noise_mask(lengths, 6, ROWS) & whole).mean() < 0.05
