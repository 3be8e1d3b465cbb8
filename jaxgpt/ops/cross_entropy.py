"""Next-token cross-entropy, the vocabulary a part at a time: logits are never whole."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config.schema import BATCH_AXES, IGNORE, REPLICAS
from jaxgpt.parallel.collectives import all_gather, reduce_scatter
from jaxgpt.parallel.replicas import sum_devices
from jaxgpt.parallel.rules import AxisRules

LOWEST = -1e30  # below every logit, and finite


def by_rows(table, count: int):
    """Returns the table's arrays, an axis V in front, cut into so many parts of equal rows."""
    return jax.tree.map(lambda a: a.reshape(count, a.shape[0] // count, -1), table)


class Reader(NamedTuple):
    """How a table is read: its logical axes; `rows(part, dtype, torus)` -> a part's rows, whole
    over `fsdp`; `scatter(their gradient, part, torus)` -> this device's share, None if not trained.
    `size(table)` -> how many rows this device has, `cut(table, count)` -> their parts, `join(parts'
    gradients)` -> the table's, with an axis for the devices in front; `grad(grad_logits, x)` -> a
    part's gradient."""

    axes: tuple
    rows: Callable
    scatter: Callable
    size: Callable = lambda table: jax.tree.leaves(table)[0].shape[0]
    cut: Callable = by_rows
    join: Callable = lambda g: jax.tree.map(lambda g: g.reshape(1, -1, g.shape[-1]), g)
    grad: Callable = functools.partial(jnp.einsum, "MV,MD->VD")


FLOATS = Reader(
    ("vocab", "embed"),
    lambda part, dtype, torus: all_gather(part.astype(dtype), 1, torus),
    lambda grad, part, torus: reduce_scatter(grad, 1, torus),
)


def cross_entropy(
    x: Float[Array, "B T D"],
    table,
    targets: Int[Array, "B T"],
    finish: Callable,
    rules: AxisRules,
    reader: Reader = FLOATS,
    bias: Float[Array, "V"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns (-log p(target) in nats, logsumexp of the logits), both 0 where target is IGNORE.

    Logits are `finish(x @ table.T + bias in float32, ids)`, elementwise, with the columns' ids [V].
    `table` is the parameter as it is split, V over `tensor` and D over the others, or what `reader`
    reads. Each part of its rows is gathered when its turn comes, in both passes, and its gradient
    scattered at once; the backward pass makes a part's logits anew, one more product for never
    keeping them. x's gradient adds up in float32; all follow from p - onehot, as logsumexp's is p.
    """
    later = jax.typeof(jax.tree.leaves(table)[0]).sharding.spec.reduced
    split = jax.P(*rules(*reader.axes), reduced=later)
    specs = rules("batch", "seq", None), split, rules("batch", "seq")
    arrays = jax.sharding.reshard((x, table, targets, bias), (*specs, rules("vocab")))
    return _cross_entropy(*arrays, finish, rules, reader)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(x, table, targets, bias, finish, rules, reader):
    return _forward(x, table, targets, bias, finish, rules, reader)[0]


def _forward(x, table, targets, bias, finish, rules, reader):
    rows, vectors = rules("batch", "seq"), rules("batch", "seq", None)
    split = rules(*reader.axes)

    def local(x, table, targets, bias):
        flat, target = x.reshape(-1, x.shape[-1]), targets.reshape(-1, 1)

        def part(carry, numbered):
            high, total, picked = carry
            logits, ids = part_logits(flat, *numbered, finish, rules, reader)[:2]
            new_high = jnp.maximum(high, jnp.max(logits, axis=-1))
            total = total * jnp.exp(high - new_high) + jnp.sum(
                jnp.exp(logits - new_high[:, None]), axis=-1
            )
            picked = picked + jnp.sum(jnp.where(ids == target, logits, 0), axis=-1)
            return (new_high, total, picked), None

        zeros = jnp.zeros(flat.shape[0], jnp.float32)
        parts = vocabulary_parts(table, flat, reader, bias)
        (high, total, picked), _ = jax.lax.scan(part, (zeros + LOWEST, zeros, zeros), parts)
        highest = jax.lax.pmax(high, "tensor")
        lse = highest + jnp.log(jax.lax.psum(total * jnp.exp(high - highest), "tensor"))
        counted = target[:, 0] != IGNORE
        nats = jnp.where(counted, lse - jax.lax.psum(picked, "tensor"), 0)
        return nats.reshape(targets.shape), jnp.where(counted, lse, 0).reshape(targets.shape)

    specs = vectors, split, rows, rules("vocab")
    run = jax.shard_map(local, in_specs=specs, out_specs=(rows, rows), check_vma=False)
    nats, lse = run(x, jax.sharding.reshard(table, split), targets, bias)
    return (nats, lse), (x, table, targets, bias, lse)


def _backward(finish, rules, reader, kept, cotangents):
    rows, vectors = rules("batch", "seq"), rules("batch", "seq", None)
    split = rules(*reader.axes)

    def local(x, table, targets, bias, lse, grad_nats, grad_lse):
        flat, target = x.reshape(-1, x.shape[-1]), targets.reshape(-1, 1)
        counted = target != IGNORE
        grad_nats = jnp.where(counted, grad_nats.reshape(-1, 1), 0)
        grad_both = grad_nats + jnp.where(counted, grad_lse.reshape(-1, 1), 0)
        # uncounted: p = exp(-inf) = 0; with their lse of 0, p would overflow and 0 * inf is NaN
        lse = jnp.where(counted, lse.reshape(-1, 1), jnp.inf)

        def part(grad_x, numbered):
            logits, ids, kernel, pullback = part_logits(flat, *numbered, finish, rules, reader)
            p = jnp.exp(logits - lse)
            grad_logits = grad_both * p - jnp.where(ids == target, grad_nats, 0)
            (grad_raw,) = pullback(grad_logits)
            grad_bias = None if bias is None else jnp.sum(grad_raw, axis=0)
            grad_raw = grad_raw.astype(flat.dtype)
            grad_kernel = reader.grad(grad_raw, flat)
            grad_kernel = reader.scatter(grad_kernel, numbered[0], rules.torus)
            added = jnp.einsum("MV,VD->MD", grad_raw, kernel, preferred_element_type=jnp.float32)
            return grad_x + added, (grad_kernel, grad_bias)

        zeros = jnp.zeros(flat.shape, jnp.float32)
        parts = vocabulary_parts(table, flat, reader, bias)
        grad_x, (grad_table, grad_bias) = jax.lax.scan(part, zeros, parts)
        grad_x = jax.lax.psum(grad_x.astype(x.dtype), "tensor").reshape(x.shape)
        grad_bias = jax.tree.map(lambda g: g.reshape(1, -1), grad_bias)
        return grad_x, reader.join(grad_table), grad_bias

    specs = vectors, split, rows, rules("vocab"), rows, rows, rows
    each = jax.P(REPLICAS, *split), jax.P((*BATCH_AXES, "context"), *rules("vocab"))
    run = jax.shard_map(local, in_specs=specs, out_specs=(vectors, *each), check_vma=False)
    x, table, *others = kept
    grad_x, grad_table, grad_bias = run(x, jax.sharding.reshard(table, split), *others, *cotangents)
    # summed out here, XLA may send it together with other gradients
    leaf = jax.typeof(jax.tree.leaves(table)[0])
    grad_table = jax.tree.map(
        lambda g: sum_devices(g, leaf.sharding.spec).astype(leaf.dtype), grad_table
    )
    grad_bias = jax.tree.map(lambda g: jnp.sum(g, axis=0).astype(kept[3].dtype), grad_bias)
    return grad_x, grad_table, None, grad_bias


_cross_entropy.defvjp(_forward, _backward)


def vocabulary_parts(table, flat, reader: Reader, bias=None):
    """Returns what the scans run over: parts of this device's rows, their first ids, and their
    biases or None."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = reader.size(table)
    count = parts_for(flat.shape[0], rows, mesh.abstract_device.platform)
    first = jax.lax.axis_index("tensor") * rows + jnp.arange(count) * (rows // count)
    return reader.cut(table, count), first, None if bias is None else bias.reshape(count, -1)


def part_logits(flat, part, first, bias, finish, rules, reader):
    """Returns a part's logits [M, V / parts], the ids of its columns, its kernel in the compute
    dtype and whole over `fsdp`, and the pullback of `finish`."""
    kernel = reader.rows(part, flat.dtype, rules.torus)
    raw = jnp.einsum("MD,VD->MV", flat, kernel, preferred_element_type=jnp.float32)
    raw = raw if bias is None else raw + bias
    ids = first + jnp.arange(kernel.shape[0])
    logits, pullback = jax.vjp(lambda raw: finish(raw, ids), raw)
    return logits, ids, kernel, pullback


def parts_for(rows: int, columns: int, platform: str) -> int:
    """Returns into how many parts to cut the vocabulary: the fewest whose float32 logits fit the
    budget, for `rows` targets and `columns` ids on one device.

    The budgets are 8 MiB on a CPU, whose caches want it so, and 256 MiB elsewhere.
    """
    budget = (8 if platform == "cpu" else 256) * 2**20
    fewest = -(-rows * columns * 4 // budget)
    return next(n for n in range(min(fewest, columns), columns + 1) if columns % n == 0)
