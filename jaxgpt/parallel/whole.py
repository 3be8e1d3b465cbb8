"""Matrices split over devices, worked on whole: each device gets all of its share of them.

Of 4 matrices whose rows are split over 2 devices (`a0` is the half of matrix a on device 0):

    a0 b0 c0 d0 | a1 b1 c1 d1   ->   a0 a1 b0 b1 | c0 c1 d0 d1   ->   and back
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.parallel.collectives import phases_over
from jaxgpt.parallel.torus import Torus


class Split(NamedTuple):
    """The mesh axes that split the axes of matrices [n, R, C], the slowest first."""

    matrices: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def on_whole(
    fn: Callable[[jax.Array], jax.Array], x: jax.Array, split: Split, torus: Torus
) -> jax.Array:
    """Returns `fn` of the matrices that are split so, split the same way; inside `shard_map`.

    `fn` gets some whole matrices [k, R, C] at a time; matrices of zeros fill up a device's share,
    if there are fewer than devices too. Devices with equal parts share their matrices as well.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    moves = [_by_copies(name, sizes[name]) for name in sizes if not any(name in s for s in split)]
    for axis in (2, 1):  # the fastest first, so that the parts come in order
        in_order = phases_over(split[axis], torus)
        moves += [_by_parts(*phase, axis) for phase in reversed(in_order)]
    return _run(fn, x, moves)


Move = Callable[[Callable, jax.Array], jax.Array]  # (what to do with fewer matrices, x) -> result


def _run(fn, x: jax.Array, moves: Sequence[Move]) -> jax.Array:
    return moves[0](lambda x: _run(fn, x, moves[1:]), x) if moves else fn(x)


def _by_parts(name: str, devices: int, groups, axis: int) -> Move:
    """Each device of a group has a part of every matrix: all-to-all there and back."""

    def move(rest, x: jax.Array) -> jax.Array:
        trade = functools.partial(
            jax.lax.all_to_all,
            axis_name=name,
            split_axis=0,
            concat_axis=0,
            tiled=True,
            axis_index_groups=groups,
        )
        n, x = len(x), _padded(x, devices)
        # [devices, k, ..., part, ...] -> [k, ..., devices * part, ...], and back
        parts = trade(x.reshape(devices, -1, *x.shape[1:]))
        joined = jnp.moveaxis(parts, 0, axis)
        shape = *joined.shape[:axis], -1, *joined.shape[axis + 2 :]
        y = rest(joined.reshape(shape)).reshape(joined.shape)
        return trade(jnp.moveaxis(y, axis, 0)).reshape(x.shape)[:n]

    return move


def _by_copies(name: str, size: int) -> Move:
    """Each device has all matrices: it takes some of them, and gathers the others' results. Of
    more devices than matrices, groups do the same work."""

    def move(rest, x: jax.Array) -> jax.Array:
        n = len(x)
        devices = max(d for d in range(1, min(n, size) + 1) if size % d == 0)
        if devices == 1:
            return rest(x)
        groups = [list(range(i, i + devices)) for i in range(0, size, devices)]
        x = _padded(x, devices)
        own = jax.lax.axis_index(name) % devices
        share = len(x) // devices
        y = rest(jax.lax.dynamic_slice_in_dim(x, own * share, share))
        return jax.lax.all_gather(y, name, tiled=True, axis_index_groups=groups)[:n]

    return move


def _padded(x: jax.Array, devices: int) -> jax.Array:
    return jnp.pad(x, ((0, -len(x) % devices), (0, 0), (0, 0)))
