"""The rows of a batch as the microbatches of a pipeline, and back.

Rows are split over the mesh's batch axes, `pipeline` among them. A microbatch takes as many rows of
each device along the others, so that it is split over these alone and no row leaves its place along
them. A batch [B, ...] is seen as [R, S, N, ...]: R over the axes before `pipeline`, S over
`pipeline`, N over the axes after it.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.config.schema import BATCH_AXES

AT = BATCH_AXES.index("pipeline")
BEFORE, AFTER = BATCH_AXES[:AT], BATCH_AXES[AT + 1 :]


def stage_axes(rows: int) -> tuple[tuple[int, int, int], tuple]:
    """Returns the sizes (R, S, N) of a batch of so many rows, and the mesh axes that split each."""
    mesh = jax.sharding.get_abstract_mesh().shape
    before, stages = math.prod(mesh[axis] for axis in BEFORE), mesh["pipeline"]
    used = (tuple(a for a in axes if mesh[a] > 1) or None for axes in (BEFORE, AFTER))
    first, last = used
    return (before, stages, rows // (before * stages)), (first, "pipeline", last)


def by_stage(a: jax.Array) -> jax.Array:
    """Returns [B, ...] as [R, S, N, ...]."""
    sizes, axes = stage_axes(a.shape[0])
    rest = jax.typeof(a).sharding.spec[1:]
    return jax.lax.reshape(a, (*sizes, *a.shape[1:]), out_sharding=P(*axes, *rest))


def from_stages(a: jax.Array) -> jax.Array:
    """Returns [R, S, N, ...] as [B, ...]."""
    spec = jax.typeof(a).sharding.spec
    rows = tuple(name for entry in spec[:3] if entry for name in _names(entry)) or None
    shape = (math.prod(a.shape[:3]), *a.shape[3:])
    return jax.lax.reshape(a, shape, out_sharding=P(rows, *spec[3:]))


def by_microbatch(a: jax.Array, count: int) -> jax.Array:
    """Returns [R, S, N, ...], whole over `pipeline`, as [M, B / M, ...]."""
    (r, s, n), spec = a.shape[:3], jax.typeof(a).sharding.spec
    first, last, rest = spec[0], spec[2], spec[3:]
    devices = _devices(last)
    split = (r, s, devices, n // devices, *a.shape[3:])
    a = jax.lax.reshape(a, split, out_sharding=P(first, None, last, None, *rest))
    a = jnp.moveaxis(a, 2, 1)
    each = s * n // (devices * count)
    split = (r, devices, count, each, *a.shape[4:])
    a = jax.lax.reshape(a, split, out_sharding=P(first, last, None, None, *rest))
    a = jnp.moveaxis(a, 2, 0)
    rows = _names(first) + _names(last) or None
    joined = (count, r * devices * each, *a.shape[4:])
    return jax.lax.reshape(a, joined, out_sharding=P(None, rows, *rest))


def from_microbatches(a: jax.Array) -> jax.Array:
    """Returns [M, B / M, ...] as [R, S, N, ...], whole over `pipeline`."""
    count, spec = a.shape[0], jax.typeof(a).sharding.spec
    (r, s, n), (first, _, last) = stage_axes(count * a.shape[1])
    devices, rest = _devices(last), spec[2:]
    each = s * n // (devices * count)
    split = (count, r, devices, each, *a.shape[2:])
    a = jax.lax.reshape(a, split, out_sharding=P(None, first, last, None, *rest))
    a = jnp.moveaxis(a, 0, 2)
    split = (r, devices, s, n // devices, *a.shape[4:])
    a = jax.lax.reshape(a, split, out_sharding=P(first, last, None, None, *rest))
    a = jnp.moveaxis(a, 1, 2)
    return jax.lax.reshape(a, (r, s, n, *a.shape[4:]), out_sharding=P(first, None, last, *rest))


def _names(entry) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _devices(entry) -> int:
    mesh = jax.sharding.get_abstract_mesh().shape
    return math.prod(mesh[axis] for axis in _names(entry))
