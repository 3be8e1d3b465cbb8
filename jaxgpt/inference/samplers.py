"""From logits to the next token: small functions on logits, applied in a fixed order.

A filter sets the logits of tokens it rules out to -inf and always leaves the likeliest.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.config import BadInput


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw. `temperature` 0 is greedy; the other defaults but `top_k` change nothing."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raises `BadInput`, naming the flag, for a value out of range."""
        for name, good, range_ in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not good:
                raise BadInput(f"--{name}={getattr(self, name)} must be {range_}")


def penalise_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Returns logits of seen tokens divided by `penalty`, times it if negative (arXiv:1909.05858,
    section 4.1)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Keeps the k likeliest tokens; ties with the k-th stay too."""
    if not 0 < k < logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keeps the fewest likeliest tokens whose probabilities reach p (arXiv:1904.09751, eq. 2)."""
    if p >= 1:
        return logits
    falling = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < p, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_min_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keeps tokens at least p times as likely as the likeliest (arXiv:2407.01082, section 3)."""
    if p <= 0:
        return logits
    likeliest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits < likeliest + jnp.log(p), -jnp.inf, logits)


def draw(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    sampling: Sampling,
    seen: Bool[Array, "B V"],
) -> Int[Array, "B"]:
    """Returns one token per row, each row with its own key; ids of logit -inf are never drawn.

    `seen` marks the tokens that stand in the row already.
    """
    if sampling.repetition_penalty != 1:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = keep_top_k(logits / sampling.temperature, sampling.top_k)
    logits = keep_min_p(keep_top_p(logits, sampling.top_p), sampling.min_p)
    return jax.vmap(jax.random.categorical)(keys, logits)
