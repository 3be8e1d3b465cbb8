"""Keys and values of the positions already seen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config import ModelConfig
from jaxgpt.parallel.rules import AxisRules


class LayerCache(NamedTuple):
    """One layer's keys and values; stacked over layers they gain a leading axis L.

    Slot s holds position s. Slots not yet written are never seen: they lie in every query's
    future.
    """

    k: Float[Array, "*L B S K H"]
    v: Float[Array, "*L B S K H"]


def empty(cfg: ModelConfig, batch: int, length: int, rules: AxisRules) -> LayerCache:
    """Returns a cache of zeros for `batch` sequences of up to `length` tokens, over all layers."""
    shape = (cfg.num_layers, batch, length, cfg.num_kv_heads, cfg.head_dim)
    spec = rules("layers", "batch", "seq", "kv_heads", "head_dim")
    zeros = jnp.zeros(shape, jnp.dtype(cfg.dtype), out_sharding=spec)
    return LayerCache(zeros, zeros)


def write(
    cache: LayerCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    rules: AxisRules,
) -> LayerCache:
    """Returns the cache with row b's T consecutive entries written from slot positions[b, 0]."""
    heads, rows = rules("batch", None, "kv_heads", None), rules("batch", None)

    def put(old, new, positions):
        def row(old, new, start):
            return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=0)

        return jax.vmap(row)(old, new, positions[:, 0])

    put = jax.shard_map(put, in_specs=(heads, heads, rows), out_specs=heads)

    def grow(old, new):  # indexing a stack forgets the axis of a lone key head: name it again
        return put(jax.sharding.reshard(old, heads), new.astype(old.dtype), positions)

    return LayerCache(grow(cache.k, k), grow(cache.v, v))
