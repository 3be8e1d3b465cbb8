"""Next-token cross-entropy."""

from collections.abc import Callable

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


def chunked_cross_entropy(
    logits_of: Callable, x: Float[Array, "B T D"], targets: Int[Array, "B T"], num_chunks: int
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns `cross_entropy(logits_of(x), targets)`, a slice of the positions at a time.

    Logits of one slice only exist at any time, in the backward pass too, which makes them anew:
    one more matrix product for T / num_chunks of the memory.
    """
    if num_chunks == 1:
        return cross_entropy(logits_of(x), targets)

    def split(a):  # [B, T, ...] -> [chunks, B, T / chunks, ...]
        return a.reshape(a.shape[0], num_chunks, -1, *a.shape[2:]).swapaxes(0, 1)

    def join(a):
        return a.swapaxes(0, 1).reshape(targets.shape)

    @jax.checkpoint
    def one(piece):
        return cross_entropy(logits_of(piece[0]), piece[1])

    nats, lse = jax.lax.map(one, (split(x), split(targets)))
    return join(nats), join(lse)


def chunks_for(batch: int, seq_len: int, vocab_size: int, platform: str) -> int:
    """Returns into how many slices to cut the positions: the fewest whose float32 logits fit the
    budget, for `batch` sequences on one device.

    The budgets are 8 MiB on a CPU, whose caches want it so (measured: 31 ms against 87 for the
    head of `configs/tiny.py`), and 256 MiB elsewhere.
    """
    budget = (8 if platform == "cpu" else 256) * 2**20
    wanted = -(-batch * seq_len * vocab_size * 4 // budget)
    return next((n for n in range(wanted, seq_len) if seq_len % n == 0), seq_len)
