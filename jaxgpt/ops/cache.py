"""Keys and values of the tokens already seen.

A cache is only read while a chunk of tokens is generated: those go into `Recent`, so that no step
copies the cache, and are written into it after the chunk. Its slots are a ring: position p is
in slot p % S, and a sequence longer than S forgets its oldest, which a window does anyway.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config import Config
from jaxgpt.parallel.rules import AxisRules

UNWRITTEN = jnp.iinfo(jnp.int32).max  # the position of an empty slot: in every query's future


class KeysValues(NamedTuple):
    """One layer's keys and values, heads in front of slots as attention reads them."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]


class Cache(NamedTuple):
    """Every layer's keys and values, and the position that each slot holds."""

    layers: tuple[KeysValues, ...]
    positions: Int[Array, "B S"]


def empty_cache(config: Config, batch: int, slots: int, rules: AxisRules) -> Cache:
    """Returns a cache with room for `slots` tokens of each of `batch` sequences."""
    spec = rules("batch", "kv_heads", None, None)
    cfg, dtype = config.model, jnp.dtype(config.compute.dtype)
    shape = (batch, cfg.num_kv_heads, slots, cfg.head_dim)

    def zeros():
        return jnp.zeros(shape, dtype, out_sharding=spec)

    layers = tuple(KeysValues(zeros(), zeros()) for _ in range(cfg.num_layers))
    unwritten = jnp.full((batch, slots), UNWRITTEN, out_sharding=rules("batch", None))
    return Cache(layers, unwritten)


def first_slots(cache: Cache, slots: int) -> Cache:
    """Returns the cache's first slots alone: reading no more than is written halves the reading."""
    layers = tuple(KeysValues(k[:, :, :slots], v[:, :, :slots]) for k, v in cache.layers)
    return Cache(layers, cache.positions[:, :slots])


def write_column(recent: KeysValues, new: KeysValues, at: Int[Array, ""]) -> KeysValues:
    """Returns `recent` with one token's keys and values [B, K, 1, H] in column `at` of every
    row."""

    def write(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=2)

    return jax.tree.map(write, recent, new)


def write_recent(cache: Cache, recent: Cache, rules: AxisRules) -> Cache:
    """Returns the cache with everything of `recent` in its slots, in place of what was there."""
    slots = jnp.where(
        recent.positions == UNWRITTEN,
        cache.positions.shape[1],  # past the end: left out
        recent.positions % cache.positions.shape[1],
    )
    spec, rows = rules("batch", "kv_heads", None, None), rules("batch", None)

    def write(old, new, slots):
        row = jax.vmap(lambda old, new, slots: old.at[:, slots].set(new, mode="drop"))
        return row(old, new, slots)

    write = jax.shard_map(write, in_specs=(spec, spec, rows), out_specs=spec)
    layers = jax.tree.map(lambda old, new: write(old, new, slots), cache.layers, recent.layers)
    write_positions = jax.vmap(lambda old, new, slots: old.at[slots].set(new, mode="drop"))
    return Cache(layers, write_positions(cache.positions, recent.positions, slots))
