"""Next-token cross-entropy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORE = -1  # a target that is not counted


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns (-log p(target) in nats, logsumexp of the logits), both 0 where target is IGNORE.

    The target's logit is picked by comparison rather than by index: it fuses with its
    neighbours and works on a vocabulary split over devices.
    """
    lse = jax.nn.logsumexp(logits, axis=-1)
    ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)
    picked = jnp.sum(jnp.where(ids == targets[..., None], logits, 0), axis=-1)
    counted = targets != IGNORE
    return jnp.where(counted, lse - picked, 0), jnp.where(counted, lse, 0)
