"""Collectives inside `shard_map` over the axes that split every parameter: one after the other, the
last fastest, and over `fsdp` in phases along the torus (see `parallel.torus`)."""

import functools

import jax
import jax.numpy as jnp

from jaxgpt.config.schema import SHARDING
from jaxgpt.parallel.torus import Phase, Torus, phases

Axes = tuple[str, ...]


def all_gather(a: jax.Array, axis: int, torus: Torus, over: Axes = SHARDING) -> jax.Array:
    """Returns the parts that all devices of `over` hold, joined along `axis`."""
    for name, _, groups in reversed(phases_over(over, torus)):
        a = jax.lax.all_gather(a, name, axis=axis, tiled=True, axis_index_groups=groups)
    return a


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(a: jax.Array, axis: int, torus: Torus, over: Axes = SHARDING) -> jax.Array:
    """Returns `all_gather` with a `reduce_scatter` as its gradient."""
    return all_gather(a, axis, torus, over)


def _scatter(axis: int, torus: Torus, over: Axes, _, grad: jax.Array) -> tuple[jax.Array]:
    return (reduce_scatter(grad, axis, torus, over),)


# `all_gather`, which a remat policy sees (see `ops.remat`)
gather.defvjp(lambda a, *rest: (all_gather(a, *rest), None), _scatter)


def reduce_scatter(a: jax.Array, axis: int, torus: Torus, over: Axes = SHARDING) -> jax.Array:
    """Returns this device's part, along `axis`, of the sum of all devices' arrays.

    The parts are an axis of their own: cut from one, XLA sends square matrices as padded sums and
    permutes.
    """
    a = jnp.moveaxis(a, axis, 0)
    for name, parts, groups in phases_over(over, torus):
        a = a.reshape(parts, a.shape[0] // parts, *a.shape[1:])
        a = jax.lax.psum_scatter(a, name, scatter_dimension=0, axis_index_groups=groups)
    return jnp.moveaxis(a, 0, axis)


def columns_to_rows(x: jax.Array, torus: Torus) -> jax.Array:
    """Returns all columns of this device's share of rows and positions, from its own columns of
    all: [B, T, D / devices] -> [B / those that split rows, T / those of `context`, D]."""
    for name in reversed(SHARDING):
        if jax.lax.axis_size(name) > 1:
            x = _trade(x, name, int(name == "context"), torus)
    return x


def _trade(x: jax.Array, name: str, axis: int, torus: Torus) -> jax.Array:
    """Returns `columns_to_rows` over one mesh axis that splits `axis`."""
    in_order, devices = phases_over((name,), torus), jax.lax.axis_size(name)
    x = jnp.moveaxis(x, axis, 0)
    shape = x.shape
    x = x.reshape(*(parts for _, parts, _ in in_order), shape[0] // devices, *shape[1:])
    for split, (_, _, groups) in reversed(list(enumerate(in_order))):
        x = jax.lax.all_to_all(
            x, name, split_axis=split, concat_axis=x.ndim - 1, tiled=True, axis_index_groups=groups
        )
    x = x.reshape(shape[0] // devices, *shape[1:-1], shape[-1] * devices)
    return jnp.moveaxis(x, 0, axis)


def phases_over(over: Axes, torus: Torus) -> list[tuple[str, *Phase]]:
    """Returns axis, devices in a group and groups of each phase of a scatter."""
    sizes = {name: jax.lax.axis_size(name) for name in over}
    return [
        (name, *phase)
        for name, size in sizes.items()
        if size > 1
        for phase in phases(torus if name == "fsdp" else (), size)
    ]
