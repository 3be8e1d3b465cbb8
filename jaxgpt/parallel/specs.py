"""Which mesh axes a `PartitionSpec` names, and which of them split every parameter."""

import math

import jax
from jax.sharding import PartitionSpec as P

from jaxgpt.config.schema import SHARDING


def unsharded(spec: P) -> P:
    """Returns a parameter's sharding, but whole over the axes that split every parameter."""
    return P(*(None if sharding_axes(P(entry)) else entry for entry in spec.partitions))


def sharding_axes(spec: P) -> tuple[str, ...]:
    """Returns those of the axes that split every parameter that split this one, in order."""
    return tuple(axis for entry in spec.partitions for axis in names(entry) if axis in SHARDING)


def sharded_axis(spec: P) -> int:
    """Returns which of a parameter's own axes they split."""
    return next(i for i, entry in enumerate(spec.partitions) if sharding_axes(P(entry)))


def names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a `PartitionSpec`."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def num_shards() -> int:
    """Returns over how many devices of the mesh in use a parameter is split."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in SHARDING)
