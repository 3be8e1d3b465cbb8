"""Rows sorted by group, and their products with a matrix of each group's own.

On TPUs the product is `jax.lax.ragged_dot`. Elsewhere XLA computes that as a product of all rows
with every group's matrix, so there the rows of a group are padded to whole blocks, and a loop
multiplies each block by the one matrix it needs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MOST_ROWS = 256  # of a block


class Groups(NamedTuple):
    """Where M items go as P rows sorted by group; `row` is P for an item of no group, and `item` is
    M for a row that is padding."""

    item: Int[Array, "P"]
    row: Int[Array, "M"]
    sizes: Int[Array, "E"]  # rows of each group, its padding included


def on_tpu() -> bool:
    """Says whether the program that is being traced is for TPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "platform", None) == "tpu"


def block_size(items: int, groups: int) -> int:
    """Returns how many rows a block has: half a group's mean, so that a quarter is padding."""
    mean = max(items // (2 * groups), 1)
    return 1 if on_tpu() else min(MOST_ROWS, 1 << (mean.bit_length() - 1))


def group(ids: Int[Array, "M"], groups: int, block: int) -> Groups:
    """Returns the items sorted by their group, in order within it, each group padded to whole
    blocks; items whose id is `groups` have none."""
    items = len(ids)
    counts, within = places(ids, groups)
    sizes = -(-counts // block) * block
    blocks = min(items, items // block + groups)
    row = jnp.where(ids < groups, jnp.append(_starts(sizes), 0)[ids] + within, blocks * block)
    empty = jnp.full(blocks * block, items, jnp.int32)
    return Groups(empty.at[row].set(jnp.arange(items), mode="drop"), row, sizes)


def places(ids: Int[Array, "M"], groups: int) -> tuple[Int[Array, "E"], Int[Array, "M"]]:
    """Returns how many items each group has, and how many of its group come before each item.

    Counted, not sorted: compiling one argsort of 32,768 for a TPU takes 4 s, and a program would
    have a dozen.
    """
    members = (ids[:, None] == jnp.arange(groups)).astype(jnp.int32)
    before = jnp.cumsum(members, axis=0) - members
    return jnp.sum(members, axis=0), jnp.sum(before * members, axis=1)


def _starts(sizes: Int[Array, "E"]) -> Int[Array, "E"]:
    return jnp.cumsum(sizes) - sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def spread(x: Float[Array, "N D"], at: Groups, copies: int) -> Float[Array, "P D"]:
    """Returns the rows of items, of which each row of x is `copies` in turn; padding is 0."""
    return x.at[at.item // copies].get(mode="fill", fill_value=0)


def _spread_backward(copies: int, at: Groups, grad):
    grad = _rows(grad, at.row).reshape(-1, copies, grad.shape[-1])
    return jnp.sum(grad, axis=1, dtype=jnp.float32).astype(grad.dtype), None


spread.defvjp(lambda x, at, copies: (spread(x, at, copies), at), _spread_backward)


@jax.custom_vjp
def collect(rows: Float[Array, "P D"], at: Groups) -> Float[Array, "M D"]:
    """Returns the items of rows, 0 for an item of no group."""
    return _rows(rows, at.row)


collect.defvjp(
    lambda rows, at: (collect(rows, at), at), lambda at, grad: (_rows(grad, at.item), None)
)


def _rows(a: Float[Array, "A D"], numbers: Int[Array, "B"]) -> Float[Array, "B D"]:
    return a.at[numbers].get(mode="fill", fill_value=0)


def products(
    x: Float[Array, "P _"],
    w: Float[Array, "E _ _"],
    sizes: Int[Array, "E"],
    block: int,
    *,
    turned: bool = False,
) -> Float[Array, "P _"]:
    """Returns each row of x times the matrix of its group, or times its transpose where `turned`,
    in the dtype of x; undefined after the last group."""
    if on_tpu():
        w = w.astype(x.dtype)
        return jax.lax.ragged_dot(x, w.swapaxes(1, 2) if turned else w, sizes)
    contracted = (1,), (int(turned),)
    width = w.shape[1 if turned else 2]

    def multiply(i, y):
        own = jax.lax.dynamic_slice_in_dim(x, i * block, block)
        matrix = jax.lax.dynamic_index_in_dim(w, _group_of(i, sizes, block), keepdims=False)
        product = jax.lax.dot_general(own, matrix.astype(x.dtype), (contracted, ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(y, product, i * block, axis=0)

    zeros = jnp.zeros((len(x), width), x.dtype)
    return jax.lax.fori_loop(0, jnp.sum(sizes) // block, multiply, zeros)


def outer_products(
    x: Float[Array, "P I"], y: Float[Array, "P O"], sizes: Int[Array, "E"], block: int
) -> Float[Array, "E I O"]:
    """Returns the sum over each group's rows of the outer products of x and y."""
    if on_tpu():
        dimensions = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        )
        return jax.lax.ragged_dot_general(x, y, sizes, dimensions)

    def add(i, total):
        own, other = (jax.lax.dynamic_slice_in_dim(a, i * block, block) for a in (x, y))
        product = jnp.einsum("BI,BO->IO", own, other, preferred_element_type=jnp.float32)
        return total.at[_group_of(i, sizes, block)].add(product)

    zeros = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, jnp.sum(sizes) // block, add, zeros).astype(y.dtype)


def _group_of(i, sizes: Int[Array, "E"], block: int) -> Int[Array, ""]:
    return jnp.sum(jnp.cumsum(sizes) <= i * block)
