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
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.system.errors import BadInput

BLOCK = 128  # ids that are drawn from together
COLDEST, HOTTEST = 1e-5, 1e6  # temperatures
LEAST = 1e-6  # of top_p


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
            (
                "temperature",
                0 <= self.temperature <= HOTTEST,
                f"at least 0 and at most {HOTTEST:.0f}",
            ),
            ("top_k", 0 <= self.top_k < 2**31, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
        ):
            if not good:
                value = str(getattr(self, name))[:50]
                raise BadInput(f"{prefix}{name}={value} must be {range_}")


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
        """Returns the rows' numbers as NumPy arrays. A temperature below `COLDEST` is 0, its limit,
        and a `top_p` below `LEAST` that, so that logits stay finite and a token is left."""
        fields = {
            field.name: [getattr(row, field.name) for row in rows]
            for field in dataclasses.fields(cls)
        }
        fields["temperature"] = [t if t >= COLDEST else 0.0 for t in fields["temperature"]]
        fields["top_p"] = [max(p, LEAST) for p in fields["top_p"]]
        return cls(
            **{
                name: np.asarray(values, np.int32 if name == "top_k" else np.float32)
                for name, values in fields.items()
            }
        )


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
    order, batch = _ordered(logits), logits.shape[0]
    lowest = jnp.iinfo(jnp.int32).min

    def narrow(i, least):
        step = jnp.where(
            i == 0, lowest, jnp.int32(1) << (31 - i).astype(jnp.int32)
        )  # lowest: wraps
        tried = least + step
        return jnp.where(enough(order >= tried[:, None]), tried, least)

    least = jax.lax.fori_loop(0, 32, narrow, jnp.full(batch, lowest, jnp.int32))
    return jnp.where(order < least[:, None], -jnp.inf, logits)


def _ordered(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Returns integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


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
    logits: Float[Array, "B V"], keys: Key[Array, "B"], rows: Samplings, seen: Bool[Array, "B V"]
) -> Int[Array, "B"]:
    """Returns one token per row, each row with its own key; ids of logit -inf are never drawn."""
    logits = filtered(logits, rows, seen)
    greedy = rows.temperature == 0

    def best(logits):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    drawn = jax.lax.cond(jnp.all(greedy), best, lambda logits: invert(logits, keys), logits)
    mixed = jnp.any(greedy) & ~jnp.all(greedy)
    return jax.lax.cond(
        mixed,
        lambda logits, drawn: jnp.where(greedy, best(logits), drawn),
        lambda logits, drawn: drawn,
        logits,
        drawn,
    )


def invert(logits: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int[Array, "B"]:
    """Returns a token per row, drawn by inverting the cumulative distribution at a uniform number.

    First the block of ids, then the id in it: that reads the row twice. Gumbel noise, which wants a
    random number for each id, took 4.3 ms for 8 rows of 50k against 0.2.
    """
    batch = logits.shape[0]
    logits = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % BLOCK)), constant_values=-jnp.inf)
    chances = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).reshape(batch, -1, BLOCK)
    upto = jnp.cumsum(jnp.sum(chances, axis=-1), axis=-1)
    uniform = jax.vmap(jax.random.uniform)(keys)[:, None]
    at = jnp.minimum(uniform * upto[:, -1:], jnp.nextafter(upto[:, -1:], -1.0))
    block = jnp.sum(upto <= at, axis=-1)
    before = jnp.where(block > 0, jnp.take_along_axis(upto, block[:, None] - 1, axis=1)[:, 0], 0)
    row = jnp.take_along_axis(chances, block[:, None, None], axis=1)[:, 0]
    within = jnp.sum(before[:, None] + jnp.cumsum(row, axis=-1) <= at, axis=-1)
    last = BLOCK - 1 - jnp.argmax(row[:, ::-1] > 0, axis=-1)  # the two sums may round apart
    return (block * BLOCK + jnp.minimum(within, last)).astype(jnp.int32)
