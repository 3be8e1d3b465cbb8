"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw: `temperature` 0 is greedy; `top_k` 0 keeps every token."""

    temperature: float = 0.8
    top_k: int = 40


def draw(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling
) -> Int[Array, "B"]:
    """Returns one token per row, each row with its own key; ids of logit -inf are never drawn."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if not 0 < sampling.top_k < logits.shape[-1]:
        return jax.vmap(jax.random.categorical)(keys, logits)
    best, ids = jax.lax.top_k(logits, sampling.top_k)
    choice = jax.vmap(jax.random.categorical)(keys, best)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
