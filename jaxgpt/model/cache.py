"""Keys and values of the tokens already seen, a ring of slots for each sequence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config import ModelConfig
from jaxgpt.parallel.rules import AxisRules

UNWRITTEN = jnp.iinfo(jnp.int32).max  # the position of an empty slot: in every query's future


class LayerCache(NamedTuple):
    """One layer's keys and values, heads in front of slots as attention reads them."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]


class Cache(NamedTuple):
    """Every layer's keys and values, and the position that each slot holds: that of position p is
    p % S. A sequence longer than S forgets its oldest, which a window does anyway."""

    layers: tuple[LayerCache, ...]
    positions: Int[Array, "B S"]


def empty(cfg: ModelConfig, batch: int, length: int, rules: AxisRules) -> Cache:
    """Returns a cache with room for `length` tokens of each of `batch` sequences."""
    shape = (batch, cfg.num_kv_heads, length, cfg.head_dim)
    spec = rules("batch", "kv_heads", None, "head_dim")

    def zeros():
        return jnp.zeros(shape, jnp.dtype(cfg.dtype), out_sharding=spec)

    layers = tuple(LayerCache(zeros(), zeros()) for _ in range(cfg.num_layers))
    unwritten = jnp.full((batch, length), UNWRITTEN, out_sharding=rules("batch", None))
    return Cache(layers, unwritten)


def write(
    cache: LayerCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    slots: Int[Array, "B"],
    rules: AxisRules,
) -> LayerCache:
    """Returns the cache with row b's T entries written from slot slots[b] on, none past the end."""
    old_spec, new_spec = rules("batch", "kv_heads", None, None), rules("batch", None, "kv_heads", None)

    def put(old, new, slots):
        def row(old, new, slot):
            return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=1)

        return jax.vmap(row)(old, new.transpose(0, 2, 1, 3).astype(old.dtype), slots)

    put = jax.shard_map(
        put, in_specs=(old_spec, new_spec, rules("batch")), out_specs=old_spec
    )
    return LayerCache(put(cache.k, k, slots), put(cache.v, v, slots))


def place(
    positions: Int[Array, "B S"], new: Int[Array, "B T"]
) -> tuple[Int[Array, "B S"], Int[Array, "B"]]:
    """Returns the slots' positions with T consecutive new ones, and the first slot of those."""
    slots = new[:, 0] % positions.shape[1]
    row = jax.vmap(lambda old, new, slot: jax.lax.dynamic_update_slice(old, new, (slot,)))
    return row(positions, new, slots), slots
