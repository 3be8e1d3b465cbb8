"""From logits to the next token: small functions on logits, applied in a fixed order.

Every number is an array [B], one for each row, so that requests of all kinds share a program. A
filter sets the logits of tokens it rules out to -inf and always leaves the likeliest.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxgpt.config import BadInput


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw. `temperature` 0 is greedy; the other defaults but `top_k` change nothing."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def check(self, prefix: str = "--") -> None:
        """Raises `BadInput`, naming the flag, for a value out of range."""
        for name, good, range_ in (
            ("temperature", 0 <= self.temperature < np.inf, "at least 0"),
            ("top_k", 0 <= self.top_k < 2**31, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "above 0"),
        ):
            if not good:
                raise BadInput(f"{prefix}{name}={getattr(self, name)} must be {range_}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samplings:
    """A `Sampling` for each row: arrays [B] of the same names."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "Samplings":
        """Returns the rows' numbers as NumPy arrays."""
        fields = {field.name: [getattr(row, field.name) for row in rows] for field in dataclasses.fields(cls)}
        return cls(**{
            name: np.asarray(values, np.int32 if name == "top_k" else np.float32)
            for name, values in fields.items()
        })  # fmt: skip


def penalise_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Returns logits of seen tokens divided by `penalty`, times it if negative (arXiv:1909.05858,
    section 4.1)."""
    by = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / by, logits * by), logits)


def keep_top_k(logits: Float[Array, "B V"], k: Int[Array, "B"]) -> Float[Array, "B V"]:
    """Keeps the k likeliest tokens, all where k is 0; ties with the k-th stay too."""

    def enough(kept: Bool[Array, "B V"]) -> Bool[Array, "B"]:
        return jnp.sum(kept, axis=-1) >= k

    return jnp.where((k == 0)[:, None], logits, _keep_least(logits, enough))


def keep_top_p(logits: Float[Array, "B V"], p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Keeps the fewest likeliest tokens whose probabilities reach p (arXiv:1904.09751, eq. 2)."""
    probabilities = jax.nn.softmax(logits, axis=-1)

    def enough(kept: Bool[Array, "B V"]) -> Bool[Array, "B"]:
        return jnp.sum(jnp.where(kept, probabilities, 0), axis=-1) >= p

    return jnp.where((p >= 1)[:, None], logits, _keep_least(logits, enough))


def keep_min_p(logits: Float[Array, "B V"], p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Keeps tokens at least p times as likely as the likeliest (arXiv:2407.01082, section 3)."""
    likeliest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits < likeliest + jnp.log(p)[:, None], -jnp.inf, logits)


def _keep_least(logits: Float[Array, "B V"], enough: Callable) -> Float[Array, "B V"]:
    """Keeps the fewest likeliest tokens that are `enough`, by bisection over the bits of a float:
    32 passes, where sorting or `lax.top_k` would be most of a decoding step (the numbers are in
    tests/benchmarks/RESULTS.md)."""
    order = _ordered(logits)

    def narrow(i, least):
        tried = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(order >= tried[:, None]), tried, least)

    least = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(order < least[:, None], -jnp.inf, logits)


def _ordered(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Returns unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1) << 31
    return jnp.where(bits & sign, ~bits, bits | sign)


def filtered(
    logits: Float[Array, "B V"], rows: Samplings, seen: Bool[Array, "B V"]
) -> Float[Array, "B V"]:
    """Returns the logits to draw from; what no row asks for is not computed.

    `seen` marks the tokens that stand in the row already. Rows of temperature 0 stay undivided.
    """

    def where_any(wanted, function, logits, *args):
        return jax.lax.cond(jnp.any(wanted), function, lambda logits, *_: logits, logits, *args)

    logits = where_any(
        rows.repetition_penalty != 1, penalise_repetition, logits, seen, rows.repetition_penalty
    )
    logits = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    drawn = rows.temperature > 0
    logits = where_any(drawn & (rows.top_k > 0), keep_top_k, logits, rows.top_k)
    logits = where_any(drawn & (rows.top_p < 1), keep_top_p, logits, rows.top_p)
    return where_any(drawn & (rows.min_p > 0), keep_min_p, logits, rows.min_p)


def draw(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    rows: Samplings,
    seen: Bool[Array, "B V"],
) -> Int[Array, "B"]:
    """Returns one token per row, each row with its own key; ids of logit -inf are never drawn."""
    logits = filtered(logits, rows, seen)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn(logits, best):
        token = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, token, best)

    return jax.lax.cond(jnp.any(rows.temperature > 0), drawn, lambda _, best: best, logits, best)
