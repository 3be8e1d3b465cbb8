"""Each sampler against the distribution it should draw from, and against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.inference.requests import Sampling
from jaxgpt.inference.samplers import (
    BLOCK,
    BatchSampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_token,
)
from jaxgpt.system.errors import BadInput

DRAWS = 20_000
LOGITS = np.log([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
IDS = np.array([300, 5, 129, 256, 128, 127])  # theirs: in three blocks of `invert`, at their edges
VOCAB = 400  # none of the others is ever drawn
assert len(set(IDS // BLOCK)) == 3 and BLOCK == 128


def softmax(x):
    e = np.exp(x - x[np.isfinite(x)].max())
    return e / e.sum()


def expected(sampling: Sampling, seen) -> np.ndarray:
    """The distribution, written out one token at a time."""
    logits = LOGITS.copy()
    for i in np.flatnonzero(seen):
        r = sampling.repetition_penalty
        logits[i] = logits[i] / r if logits[i] > 0 else logits[i] * r
    logits = logits / sampling.temperature
    order = list(np.argsort(-logits))
    kept = order[: sampling.top_k] if sampling.top_k else order
    p = softmax(np.where(np.isin(np.arange(6), kept), logits, -np.inf))
    mass, nucleus = 0.0, []
    for i in kept:
        if mass < sampling.top_p:
            nucleus.append(i)
        mass += p[i]
    p = np.where(np.isin(np.arange(6), nucleus), p, 0)
    p = np.where(p >= sampling.min_p * p.max(), p, 0)
    return p / p.sum()


CASES = {
    "plain": (Sampling(1.0, 0), []),
    "temperature": (Sampling(2.0, 0), []),
    "top-k": (Sampling(1.0, 3), []),
    "top-p": (Sampling(1.0, 0, top_p=0.7), []),
    "min-p": (Sampling(1.0, 0, min_p=0.3), []),
    "repetition": (Sampling(1.0, 0, repetition_penalty=1.5), [0, 2]),
    "all together": (Sampling(1.3, 5, 0.9, 0.1, 1.2), [1]),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name):
    """Chi-squared over many draws: below the 99.99% quantile for 5 degrees of freedom, 25.7."""
    sampling, ids = CASES[name]
    want = expected(sampling, np.isin(np.arange(6), ids))
    keys = jax.random.split(jax.random.key(0), DRAWS)
    row, seen = np.full(VOCAB, -np.inf, np.float32), np.zeros(VOCAB, bool)
    row[IDS], seen[IDS[ids]] = LOGITS, True
    rows = BatchSampling.of([sampling] * DRAWS)
    tokens = jax.jit(next_token)(jnp.tile(row, (DRAWS, 1)), keys, rows, jnp.tile(seen, (DRAWS, 1)))
    found = np.bincount(np.asarray(tokens), minlength=VOCAB)
    counts = found[IDS]
    assert counts.sum() == DRAWS
    assert np.all(counts[want == 0] == 0), "what is ruled out is never drawn"
    real = want > 0
    chi2 = np.sum((counts[real] - DRAWS * want[real]) ** 2 / (DRAWS * want[real]))
    assert chi2 < 25.7
    if name != "plain":
        plain = softmax(LOGITS)
        assert np.abs(want - plain).max() > 0.02, "the case must differ from plain sampling"


def test_greedy_takes_the_best_and_padding_is_never_drawn():
    logits = jnp.asarray([[1.0, 3.0, 2.0, -jnp.inf]] * 500)
    keys = jax.random.split(jax.random.key(1), 500)
    seen = jnp.zeros(logits.shape, bool)
    assert np.all(
        np.asarray(next_token(logits, keys, BatchSampling.of([Sampling(0.0)] * 500), seen)) == 1
    )
    hot = np.asarray(next_token(logits, keys, BatchSampling.of([Sampling(100.0, 0)] * 500), seen))
    assert set(hot) == {0, 1, 2}


def test_rows_of_all_kinds_share_a_call():
    """Each row draws as if it were alone: same key, same token."""
    jitted = jax.jit(next_token)
    kinds = [sampling for sampling, _ in CASES.values()] + [Sampling(0.0, 3)]
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=(len(kinds), 300)) * 3, jnp.float32)
    seen = jnp.asarray(rng.random((len(kinds), 300)) < 0.2)
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), len(kinds))
        together = jitted(logits, keys, BatchSampling.of(kinds), seen)
        for i, kind in enumerate(kinds):
            row = slice(i, i + 1)
            alone = jitted(logits[row], keys[row], BatchSampling.of([kind]), seen[row])
            assert int(alone[0]) == int(together[i])


@pytest.mark.parametrize("k", [1, 7, 200, 999, 1000, 5000])
def test_top_k_by_bisection_is_top_k_by_sorting(k):
    logits = np.random.default_rng(k).normal(size=(4, 1000)).astype(np.float32) * 50
    logits[1] = np.round(logits[1])  # ties
    logits[2, 500:] = -np.inf
    logits[3] = -np.abs(logits[3])
    kept = np.asarray(keep_top_k(jnp.asarray(logits), jnp.full(4, k)))
    least = np.sort(logits, axis=-1)[:, -min(k, 1000)][:, None]
    np.testing.assert_array_equal(kept, np.where(logits < least, -np.inf, logits))


def test_top_p_by_bisection_is_top_p_by_sorting():
    logits = np.random.default_rng(0).normal(size=(50, 1000)).astype(np.float32) * 3
    for p in (0.1, 0.5, 0.9, 0.999):
        kept = np.isfinite(np.asarray(keep_top_p(jnp.asarray(logits), jnp.full(50, p))))
        exact = logits.astype(np.float64)
        chances = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
        order = np.argsort(-exact, axis=-1)
        falling = np.take_along_axis(chances, order, -1)
        wanted = ((np.cumsum(falling, -1) - falling) < p).sum(-1)
        assert np.all(np.abs(kept.sum(-1) - wanted) <= 1), "but for rounding of the mass"


def test_every_filter_leaves_the_likeliest():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 9)), jnp.float32)
    best = np.argmax(logits, -1)
    one = jnp.ones(50)
    for kept in (
        keep_top_k(logits, jnp.ones(50, int)),
        keep_top_p(logits, 1e-6 * one),
        keep_min_p(logits, one),
    ):
        np.testing.assert_array_equal(np.isfinite(kept).sum(-1), 1)
        np.testing.assert_array_equal(np.argmax(kept, -1), best)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -1.0),
        ("repetition_penalty", 0.0),
        ("temperature", float("nan")),
    ],
)
def test_values_out_of_range(field, value):
    with pytest.raises(BadInput, match=f"--{field}="):
        Sampling(**{field: value}).check()


def test_a_temperature_that_overflows_float32_is_greedy():
    rows = BatchSampling.of([Sampling(1e-38, 0)])
    logits = jnp.array([[1000.0, 999.0, 1001.0]])
    key = jax.random.split(jax.random.key(0), 1)
    assert next_token(logits, key, rows, jnp.zeros((1, 3), bool)).tolist() == [2]
