"""Dropout whose masks depend on the key and on a row's place in the batch, on nothing else: neither
the mesh nor the microbatches of a pipeline change what is dropped."""

from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jaxgpt.parallel.microbatches import by_microbatch, stage_axes


class MicrobatchKey(NamedTuple):
    """A key for one of a pipeline's microbatches: it draws the whole batch's mask and takes that
    microbatch's rows of it."""

    key: PRNGKeyArray
    index: Int[Array, ""]
    count: int


Key = PRNGKeyArray | MicrobatchKey


def split(key: Key | None, num: int) -> tuple[Key | None, ...]:
    """Returns `num` keys of one; None, which drops nothing, stays None."""
    if key is None:
        return (None,) * num
    if isinstance(key, MicrobatchKey):
        return tuple(key._replace(key=k) for k in jax.random.split(key.key, num))
    return tuple(jax.random.split(key, num))


def draw_kept(key: Key, rate: float, shape: tuple[int, ...], spec: P) -> Bool[Array, "*S"]:
    """Returns which elements of [B, ...] dropout keeps, split as `spec` says."""
    if not isinstance(key, MicrobatchKey):
        return jax.random.bernoulli(key, 1 - rate, shape, out_sharding=spec)
    sizes, axes = stage_axes(shape[0] * key.count)
    drawn = jax.random.bernoulli(
        key.key, 1 - rate, (*sizes, *shape[1:]), out_sharding=P(axes[0], None, axes[2], *spec[1:])
    )
    return jax.lax.dynamic_index_in_dim(by_microbatch(drawn, key.count), key.index, keepdims=False)
