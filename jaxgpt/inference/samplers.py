"""From logits to the next token: small functions on logits, applied in a fixed order.

Every setting is an array [B], one value for each row, so that rows with different settings share a
program. A filter sets the logits of the tokens that it excludes to -inf and always keeps the
likeliest token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.inference.requests import Sampling

BLOCK = 128  # ids whose probabilities `sample` adds up first
MIN_TEMPERATURE = 1e-5
MIN_TOP_P = 1e-6


class BatchSampling(NamedTuple):
    """The settings of B rows, as arrays."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "BatchSampling":
        """Returns the rows' settings as NumPy arrays. So that float32 logits stay finite, a
        temperature below `MIN_TEMPERATURE` becomes 0 and a `top_p` at least `MIN_TOP_P`."""
        columns = map(np.array, zip(*map(dataclasses.astuple, rows), strict=True))
        temperature, top_k, top_p, min_p, penalty = columns
        temperature = np.where(temperature < MIN_TEMPERATURE, 0, temperature)
        top_p = np.maximum(top_p, MIN_TOP_P)
        floats = (a.astype(np.float32) for a in (top_p, min_p, penalty))
        return cls(temperature.astype(np.float32), top_k.astype(np.int32), *floats)


def penalise_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Returns the logits with those of seen tokens divided by `penalty` if positive, multiplied by
    it if negative (arXiv:1909.05858, section 4.1)."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Array, "B V"], k: Int[Array, "B"]) -> Float[Array, "B V"]:
    """Keeps the k likeliest tokens and those that tie with the k-th; all where k is 0."""
    kept = _keep_fewest(logits, lambda kept: jnp.sum(kept, axis=-1) >= k)
    return jnp.where((k == 0)[:, None], logits, kept)


def keep_top_p(logits: Float[Array, "B V"], p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Keeps the fewest likeliest tokens whose probabilities reach p (arXiv:1904.09751, eq. 2)."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    kept = _keep_fewest(logits, lambda kept: jnp.sum(probabilities, -1, where=kept) >= p)
    return jnp.where((p >= 1)[:, None], logits, kept)


def keep_min_p(logits: Float[Array, "B V"], p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Keeps tokens at least p times as likely as the likeliest (arXiv:2407.01082, section 3)."""
    likeliest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits < likeliest + jnp.log(p)[:, None], -jnp.inf, logits)


def _keep_fewest(logits: Float[Array, "B V"], enough: Callable) -> Float[Array, "B V"]:
    """Keeps the fewest likeliest tokens that are `enough`. The threshold is found by bisection over
    the bits of a float, in 32 passes: sorting or `lax.top_k` would take most of a decoding step
    (the measurements are in tests/benchmarks/RESULTS.md)."""
    order, batch = _ordered_bits(logits), logits.shape[0]
    lowest = jnp.iinfo(jnp.int32).min

    def narrow(i, threshold):
        bit = jnp.int32(1) << (31 - i).astype(jnp.int32)
        raised = threshold + jnp.where(i == 0, lowest, bit)  # lowest + lowest wraps around to 0
        return jnp.where(enough(order >= raised[:, None]), raised, threshold)

    threshold = jax.lax.fori_loop(0, 32, narrow, jnp.full(batch, lowest, jnp.int32))
    return jnp.where(order < threshold[:, None], -jnp.inf, logits)


def _ordered_bits(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Returns integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def filter_logits(
    logits: Float[Array, "B V"], rows: BatchSampling, seen: Bool[Array, "B V"]
) -> Float[Array, "B V"]:
    """Returns the logits to sample from; a filter that no row uses is not computed.

    `seen` marks the tokens that a row already contains. Greedy rows are not divided by their
    temperature.
    """

    def where_any(wanted, function, logits, *args):
        return jax.lax.cond(jnp.any(wanted), function, lambda logits, *_: logits, logits, *args)

    penalty, sampled = rows.repetition_penalty, rows.temperature > 0
    logits = where_any(penalty != 1, penalise_repetition, logits, seen, penalty)
    logits = logits / jnp.where(sampled, rows.temperature, 1)[:, None]
    logits = where_any(sampled & (rows.top_k > 0), keep_top_k, logits, rows.top_k)
    logits = where_any(sampled & (rows.top_p < 1), keep_top_p, logits, rows.top_p)
    return where_any(sampled & (rows.min_p > 0), keep_min_p, logits, rows.min_p)


def next_token(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    rows: BatchSampling,
    seen: Bool[Array, "B V"],
) -> Int[Array, "B"]:
    """Returns one token per row, each row with its own key; never an id whose logit is -inf."""
    logits, greedy = filter_logits(logits, rows, seen), rows.temperature == 0

    def likeliest():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sampled():
        return sample(logits, keys)

    def mixed():
        return jnp.where(greedy, likeliest(), sampled())

    kind = jnp.where(jnp.all(greedy), 0, jnp.where(jnp.any(greedy), 2, 1))
    return jax.lax.switch(kind, (likeliest, sampled, mixed))


def sample(logits: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int[Array, "B"]:
    """Returns a token per row, sampled by inverting the cumulative distribution at a uniform
    number.

    It finds first the block of ids, then the id in the block, and so reads the row twice. Gumbel
    noise needs a random number for each id: it took 4.3 ms for 8 rows of 50k ids, this 0.2 ms.
    """
    batch = logits.shape[0]
    logits = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % BLOCK)), constant_values=-jnp.inf)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).reshape(batch, -1, BLOCK)
    cumulative = jnp.cumsum(jnp.sum(weights, axis=-1), axis=-1)
    total, uniform = cumulative[:, -1:], jax.vmap(jax.random.uniform)(keys)[:, None]
    target = jnp.minimum(uniform * total, jnp.nextafter(total, -1.0))
    block = jnp.sum(cumulative <= target, axis=-1)
    before = jnp.take_along_axis(cumulative, block[:, None] - 1, axis=1)[:, 0]
    before = jnp.where(block > 0, before, 0)
    row = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    within = jnp.sum(before[:, None] + jnp.cumsum(row, axis=-1) <= target, axis=-1)
    last = BLOCK - 1 - jnp.argmax(row[:, ::-1] > 0, axis=-1)  # the two sums may round differently
    return (block * BLOCK + jnp.minimum(within, last)).astype(jnp.int32)
