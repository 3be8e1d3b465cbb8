"""What a pipeline keeps for its backward pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxgpt.config.pipeline import Schedule
from jaxgpt.config.schema import MESH_AXES
from jaxgpt.parallel.specs import names

COPIED = ("kernel", "factor_in", "factor_out")  # parameters that a layer is given whole
AXIS = "pipeline"


class Kept:
    """What the backward pass is given: each device's own inputs of all items, [slots, devices,
    ...], and in their place, round after round, the gradients of its kernels.

    A round has a slot for each of its items, or more where its gradients, `size` numbers on a
    device, are larger.
    """

    def __init__(self, at: Schedule, items, size: int):
        self.at, self.spec = at, P(*jax.typeof(items).sharding.spec[1:])
        mesh = jax.sharding.get_abstract_mesh().shape
        self.axes = tuple(axis for axis in MESH_AXES if axis != AXIS)
        self.shape = tuple(
            n // math.prod(mesh[axis] for axis in names(entry))
            for n, entry in zip(items.shape[1:], self.spec, strict=True)
        )
        self.dtype, self.devices = items.dtype, math.prod(mesh[axis] for axis in self.axes)
        self.own = P(self.axes, *(None,) * len(self.shape))
        self.needed = -(-size // math.prod(self.shape))
        self.slots = max(at.microbatches, self.needed)

    def empty(self) -> jax.Array:
        """Returns the array with nothing in it."""
        shape = (self.at.rounds * self.slots, self.devices, *self.shape)
        return jnp.zeros(shape, self.dtype, out_sharding=P(None, *self.own))

    def put_input(self, saved, x, item, valid):
        """Returns it with an item's input, if that is `valid`."""
        at = self._slot(item)
        own = jax.shard_map(
            lambda a: a[None], in_specs=self.spec, out_specs=self.own, check_vma=False
        )(x)
        return put(saved, jnp.where(valid, own, at_index(saved, at)), at)

    def input(self, saved, item) -> jax.Array:
        """Returns an item's input."""
        take = jax.shard_map(
            lambda a: a[0], in_specs=self.own, out_specs=self.spec, check_vma=False
        )
        return take(at_index(saved, self._slot(item)))

    def put_gradients(self, saved, grads: list, r, valid):
        """Returns it with a round's gradients, if they are `valid`."""
        room = self.needed * math.prod(self.shape)

        def pack(*parts):
            flat = jnp.concatenate([a.astype(self.dtype).reshape(-1) for a in parts])
            flat = jnp.pad(flat, (0, room - flat.size))
            return flat.reshape(self.needed, 1, *self.shape)

        specs = tuple(jax.typeof(a).sharding.spec for a in grads)
        packed = jax.shard_map(pack, in_specs=specs, out_specs=P(None, *self.own), check_vma=False)(
            *grads
        )
        old = self._of_round(saved, r)
        new = jnp.where(valid, packed, old)
        return jax.lax.dynamic_update_slice_in_dim(saved, new, r * self.slots, axis=0)

    def gradients(self, saved, like: list, r) -> list:
        """Returns a round's gradients, of these shapes and shardings."""
        specs = tuple(jax.typeof(a).sharding.spec for a in like)

        def unpack(packed, *parts):
            ends = np.cumsum([a.size for a in parts]).tolist()
            flat = jnp.split(packed.reshape(-1)[: ends[-1]], ends[:-1])
            return tuple(a.reshape(b.shape) for a, b in zip(flat, parts, strict=True))

        run = jax.shard_map(
            unpack, in_specs=(P(None, *self.own), *specs), out_specs=specs, check_vma=False
        )
        return list(run(self._of_round(saved, r), *like))

    def _slot(self, item):
        r, m = divmod(item, self.at.microbatches)
        return r * self.slots + m

    def _of_round(self, saved, r):
        return jax.lax.dynamic_slice_in_dim(saved, r * self.slots, self.needed, axis=0)


def parted(tree) -> tuple[list, list]:
    """Returns a tree's kernels, which are copied, and its other arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    kernels = [a for path, a in leaves if is_copied(path)]
    return kernels, [a for path, a in leaves if not is_copied(path)]


def joined(tree, kernels: list, others: list):
    """Returns a tree of the two parts of `parted`."""
    parts = iter(kernels), iter(others)
    return jax.tree_util.tree_map_with_path(lambda path, _: next(parts[not is_copied(path)]), tree)


def own_size(a: jax.Array) -> int:
    """Returns how many of an array's numbers a device has."""
    mesh = jax.sharding.get_abstract_mesh().shape
    axes = (axis for entry in jax.typeof(a).sharding.spec for axis in names(entry))
    return a.size // math.prod(mesh[axis] for axis in axes)


def is_copied(path) -> bool:
    """Says whether a parameter at this path is a kernel, which a layer is given as a copy."""
    return any(getattr(part, "key", getattr(part, "name", None)) in COPIED for part in path)


def at_index(a: jax.Array, index) -> jax.Array:
    """Returns a[index]; the index may be computed."""
    return jax.lax.dynamic_index_in_dim(a, index, keepdims=False)


def put(a: jax.Array, value: jax.Array, index) -> jax.Array:
    """Returns `a` with a[index] set to `value`."""
    return jax.lax.dynamic_update_index_in_dim(a, value, index, 0)
