"""The order of positions over the mesh axis `context`.

If each of C devices had one part of a row, under a causal mask the last would have the most work.
So a row is cut into 2C chunks, and device c has chunks c and 2C-1-c (the zig-zag of
arXiv:2407.21783, section 3.3.2): with C = 2, chunks 0 and 3, and 1 and 2. Only a stack of layers
has this order; everything outside has the natural one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.ops.mask import Reach

AXIS = "context"


def is_split(spec: jax.P, axis: int = 1) -> bool:
    """Says whether arrays of this sharding have the positions along `axis` on several devices of
    `context`."""
    names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    return AXIS in names and jax.sharding.get_abstract_mesh().shape[AXIS] > 1


def exchanged(tree, reach: Reach, axis: int = 1, back: bool = False):
    """Returns the arrays of a stack of layers of this reach as its layers have them, from natural
    order (or `back` in it): in zig-zag order along `axis` if the stack is causal and positions are
    split. Arrays without the axis stay as they are."""

    def exchange(a):
        if a.ndim <= axis or not is_split(spec := jax.typeof(a).sharding.spec, axis):
            return a
        whole = jax.P(*(AXIS if i == axis else name for i, name in enumerate(spec)))
        local = functools.partial(to_natural if back else to_zigzag, axis=axis)
        run = jax.shard_map(local, in_specs=whole, out_specs=whole, check_vma=False)
        return jax.sharding.reshard(run(jax.sharding.reshard(a, whole)), spec)

    return jax.tree.map(exchange, tree) if reach.causal else tree


def zigzag(a, devices: int):
    """Returns an array (NumPy's or JAX's) that is whole along its first axis, in zig-zag order: the
    chunks of device 0, then those of device 1, ..."""
    xp = np if isinstance(a, np.ndarray) else jnp
    chunks = xp.split(a, 2 * devices)
    return xp.concatenate([chunks[n] for c in range(devices) for n in (c, 2 * devices - 1 - c)])


def natural(a: jax.Array, axis: int, devices: int) -> jax.Array:
    """Returns an array that is whole along `axis`, from zig-zag order, in natural order."""
    shape = a.shape
    a = a.reshape(*shape[:axis], devices, 2, shape[axis] // devices // 2, *shape[axis + 1 :])
    first, second = jnp.moveaxis(a, axis + 1, 0)
    return jnp.concatenate([first, jnp.flip(second, axis)], axis).reshape(shape)


def to_zigzag(a: jax.Array, axis: int) -> jax.Array:
    """Returns this device's chunks in zig-zag order, from its part in natural order; inside
    `shard_map`. Each device sends and receives one chunk with an even number and one with an odd
    one."""
    first, second = jnp.split(a, 2, axis=axis)
    even = jax.lax.ppermute(first, AXIS, _pairs(0))
    odd = jax.lax.ppermute(second, AXIS, _pairs(1))
    return jnp.concatenate(_in_turn(even, odd), axis)


def to_natural(a: jax.Array, axis: int) -> jax.Array:
    """Returns the inverse of `to_zigzag`."""
    even, odd = _in_turn(*jnp.split(a, 2, axis=axis))
    first = jax.lax.ppermute(even, AXIS, [(to, of) for of, to in _pairs(0)])
    second = jax.lax.ppermute(odd, AXIS, [(to, of) for of, to in _pairs(1)])
    return jnp.concatenate([first, second], axis)


def _pairs(parity: int) -> list[tuple[int, int]]:
    """Returns (the device in natural order, that in zig-zag order) of each chunk of a parity."""
    devices = jax.lax.axis_size(AXIS)
    return [(n // 2, min(n, 2 * devices - 1 - n)) for n in range(parity, 2 * devices, 2)]


def _in_turn(one: jax.Array, other: jax.Array) -> list[jax.Array]:
    """Returns both as they are on even devices, whose first chunk is an even one, else swapped."""
    is_even = jax.lax.axis_index(AXIS) % 2 == 0
    return [jnp.where(is_even, one, other), jnp.where(is_even, other, one)]
