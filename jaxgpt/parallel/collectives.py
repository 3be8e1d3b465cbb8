"""Collectives over `fsdp` inside `shard_map`, in phases along the torus (see `parallel.torus`)."""

import functools

import jax
import jax.numpy as jnp

from jaxgpt.parallel.torus import Phase, Torus, phases


def all_gather(a: jax.Array, axis: int, torus: Torus) -> jax.Array:
    """Returns the parts that all devices of `fsdp` hold, joined along `axis`."""
    for _, groups in reversed(_phases(torus)):
        a = jax.lax.all_gather(a, "fsdp", axis=axis, tiled=True, axis_index_groups=groups)
    return a


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(a: jax.Array, axis: int, torus: Torus) -> jax.Array:
    """Returns `all_gather` with a `reduce_scatter` as its gradient."""
    return _gather(a, axis, torus)


def _gather(a: jax.Array, axis: int, torus: Torus) -> jax.Array:
    return all_gather(a, axis, torus) if jax.lax.axis_size("fsdp") > 1 else a


def _scatter(axis: int, torus: Torus, _, grad: jax.Array) -> tuple[jax.Array]:
    return (reduce_scatter(grad, axis, torus) if jax.lax.axis_size("fsdp") > 1 else grad,)


# `_gather`, whose all-gather a remat policy sees (see `ops.remat`)
gather.defvjp(lambda a, axis, torus: (_gather(a, axis, torus), None), _scatter)


def reduce_scatter(a: jax.Array, axis: int, torus: Torus) -> jax.Array:
    """Returns this device's part, along `axis`, of the sum of all devices' arrays.

    The parts are an axis of their own: cut from one, XLA sends square matrices as padded sums and
    permutes.
    """
    a = jnp.moveaxis(a, axis, 0)
    for parts, groups in _phases(torus):
        a = a.reshape(parts, a.shape[0] // parts, *a.shape[1:])
        a = jax.lax.psum_scatter(a, "fsdp", scatter_dimension=0, axis_index_groups=groups)
    return jnp.moveaxis(a, 0, axis)


def all_to_all(x: jax.Array, torus: Torus) -> jax.Array:
    """Returns all columns of this device's share of the rows, from its own columns of all rows:
    [rows, ..., columns / devices] -> [rows / devices, ..., columns].
    """
    in_order, shape, devices = _phases(torus), x.shape, jax.lax.axis_size("fsdp")
    x = x.reshape(*(parts for parts, _ in in_order), shape[0] // devices, *shape[1:])
    for axis, (_, groups) in reversed(list(enumerate(in_order))):
        x = jax.lax.all_to_all(
            x, "fsdp", split_axis=axis, concat_axis=x.ndim - 1, tiled=True, axis_index_groups=groups
        )
    return x.reshape(shape[0] // devices, *shape[1:-1], shape[-1] * devices)


def _phases(torus: Torus) -> list[Phase]:
    return phases(torus, jax.lax.axis_size("fsdp"))
