"""Keys and values of the tokens already seen.

A cache is only read while a chunk of tokens is generated: those go into `Recent`, so that no step
copies the cache, and are written into it after the chunk. Its slots are a ring: position p is
in slot p % S, and a sequence longer than S forgets its oldest, which a window does anyway.

Over the C devices of `context` the slots of a cache are dealt out in turn: slot s is with device
s % C, so that the first slots of all devices are the first of the ring.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config import Config
from jaxgpt.ops.context.order import AXIS
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


def empty_cache(
    config: Config, batch: int, slots: int, rules: AxisRules, split: bool = False
) -> Cache:
    """Returns a cache with room for `slots` tokens of each of `batch` sequences; `split` over
    `context`, which must divide them."""
    rows, heads, axis = *rules("batch", "kv_heads"), split_axis() if split else None
    spec = jax.P(rows, heads, axis, None)
    cfg, dtype = config.model, jnp.dtype(config.compute.dtype)
    shape = (batch, cfg.num_kv_heads, slots, cfg.head_dim)

    def zeros():
        return jnp.zeros(shape, dtype, out_sharding=spec)

    layers = tuple(KeysValues(zeros(), zeros()) for _ in range(cfg.num_layers))
    unwritten = jnp.full((batch, slots), UNWRITTEN, out_sharding=jax.P(rows, axis))
    return Cache(layers, unwritten)


def split_axis() -> str | None:
    """Returns the mesh axis that caches are split over, if it has several devices."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return AXIS if sizes.get(AXIS, 1) > 1 else None


def first_slots(cache: Cache, slots: int) -> Cache:
    """Returns the cache's first slots alone: reading no more than is written halves the reading."""

    def first(a, axis):
        spec = jax.typeof(a).sharding.spec
        devices = jax.sharding.get_abstract_mesh().shape[AXIS] if AXIS in spec else 1
        local = functools.partial(jax.lax.slice_in_dim, limit_index=slots // devices, axis=axis)
        return jax.shard_map(lambda a: local(a, start_index=0), in_specs=spec, out_specs=spec)(a)

    layers = tuple(KeysValues(first(k, 2), first(v, 2)) for k, v in cache.layers)
    return Cache(layers, first(cache.positions, 1))


def write_column(recent: KeysValues, new: KeysValues, at: Int[Array, ""]) -> KeysValues:
    """Returns `recent` with one token's keys and values [B, K, 1, H] in column `at` of every
    row."""

    def write(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=2)

    return jax.tree.map(write, recent, new)


def write_recent(cache: Cache, recent: Cache, rules: AxisRules) -> Cache:
    """Returns the cache with everything of `recent` in its slots, in place of what was there."""
    total, of_cache = cache.positions.shape[1], jax.typeof(cache.positions).sharding.spec
    slots = jnp.where(recent.positions == UNWRITTEN, total, recent.positions % total)
    split, rows, spec = of_cache[1], rules("batch", None), rules("batch", "kv_heads", None, None)

    def own(slots):
        """Returns each slot's place on this device, past the end where it has none."""
        if not split:
            return slots
        devices = jax.lax.axis_size(split)
        is_here = (slots % devices == jax.lax.axis_index(split)) & (slots < total)
        return jnp.where(is_here, slots // devices, total)

    def write(old, new, slots):
        row = jax.vmap(lambda old, new, slots: old.at[..., slots, :].set(new, mode="drop"))
        return row(old, new, own(slots))

    def write_positions(old, new, slots):
        return write(old[:, :, None], new[:, :, None], slots)[:, :, 0]

    split_spec = jax.P(*spec[:2], split, None)
    write_layer = jax.shard_map(write, in_specs=(split_spec, spec, rows), out_specs=split_spec)
    write_rows = jax.shard_map(write_positions, in_specs=(of_cache, rows, rows), out_specs=of_cache)
    layers = jax.tree.map(lambda *pair: write_layer(*pair, slots), cache.layers, recent.layers)
    return Cache(layers, write_rows(cache.positions, recent.positions, slots))
