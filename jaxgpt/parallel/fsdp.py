"""Fully sharded data parallelism (FSDP; ZeRO stage 3, arXiv:1910.02054, section 5.3).

Every device of the mesh axis `fsdp` trains its own rows of the batch, as in data parallelism, but
keeps only its part of each parameter, gradient and optimizer moment. So do the devices of `expert`,
`context` and `pipeline`, whose business is another. A layer's weight is gathered
just before it multiplies (all-gather), in the forward pass and again in the backward pass, and
dropped at once: kept, the gathered weights would be as large as the model. Its gradient, which each
device has for its own rows only, is summed and cut into parts in one step (reduce-scatter), so that
no device holds a whole summed gradient either. Over `data`, whose devices hold equal parameters,
gradients are summed whole (all-reduce).

Left to XLA, some of these become sums of mostly-zero arrays on TPUs; here each is the collective
named above, in one phase for each axis of the torus (see `parallel.torus`).
"""

import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxgpt.parallel.collectives import all_gather, reduce_scatter
from jaxgpt.parallel.replicas import plain, sum_devices
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parallel.specs import sharded_axis, sharding_axes, unsharded

GATHERED = "gathered_weights"  # what no remat policy keeps: as large as the model


def product(
    equation: str, x: jax.Array, kernel: jax.Array, out: P, rules: AxisRules, matmul
) -> jax.Array:
    """Returns einsum(equation, x, kernel in x's dtype and whole over fsdp), [B, T, ...], of
    sharding `out`; "MNH,NHD->MD" is a product over N and H, with M for B and T.

    `matmul` (see `ops.matmul`) multiplies. Kernels are multiplied and sent as matrices: heads as an
    axis of their own, XLA's TPU compiler makes them a convolution's window. The gradient is sent in
    x's dtype.
    """
    first = int(rules.gathered)
    outputs = first + equation.index(",") - 1
    matrix = flat(flat(kernel, first, outputs), first + 1, kernel.ndim)
    y = _product(flat(x, 2, x.ndim), matrix, P(*out[:3]), rules, matmul)
    return jax.lax.reshape(y, (*y.shape[:2], *kernel.shape[outputs:]), out_sharding=out)


def flat(a: jax.Array, start: int, end: int) -> jax.Array:
    """Returns `a` with its axes from `start` up to `end` as one, split as the first of them is."""
    spec = jax.typeof(a).sharding.spec
    shape = (*a.shape[:start], math.prod(a.shape[start:end]), *a.shape[end:])
    parts = spec.partitions
    kept = P(*parts[: start + 1], *parts[end:], reduced=spec.reduced)
    return jax.lax.reshape(a, shape, out_sharding=kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: jax.Array, kernel: jax.Array, out: P, rules: AxisRules, matmul) -> jax.Array:
    """`product` of [B, T, I] and a matrix [I, O]."""
    return _forward(x, kernel, out, rules, matmul)[0]


def _forward(x, kernel, out, rules, matmul):
    w = matmul.weight(plain(kernel), x.dtype)
    whole = jax.tree.map(lambda a: checkpoint_name(gather_weight(a, rules), GATHERED), w)
    return matmul.forward(x, whole, out), (x, whole, kernel)


def _backward(out, rules, matmul, saved, grad_y):
    x, whole, kernel = saved
    grad_x = matmul.grad_x(x, whole, grad_y, out)
    spec = jax.typeof(kernel).sharding.spec
    if matmul.grad_w and not (_is_split(spec) or spec.reduced or rules.gathered):
        grad_whole = matmul.grad_w(x, whole, grad_y, out)
        return grad_x, jax.sharding.reshard(grad_whole, spec).astype(kernel.dtype)
    own = spec if rules.gathered else P(rules.rows, *unsharded(spec))
    grad_own = matmul.grad_w_by_device(
        _rows_by_device(x, rules), _rows_by_device(grad_y, rules), own
    )
    if rules.gathered:
        return grad_x, grad_own
    return grad_x, sum_gradient(grad_own, spec, rules).astype(kernel.dtype)


_product.defvjp(_forward, _backward)


def _is_split(spec: P) -> bool:
    """Says whether several devices hold parts of an array."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in sharding_axes(spec)) > 1


def gather_weight(a: jax.Array, rules: AxisRules) -> jax.Array:
    """Returns `a` whole over the axes that split every parameter, by all-gathers."""
    if rules.gathered:
        spec = jax.typeof(a).sharding.spec
        out = P(*spec[1:])
        return jax.shard_map(lambda a: a[0], in_specs=spec, out_specs=out, check_vma=False)(a)
    spec = jax.typeof(a).sharding.spec
    if not _is_split(spec):
        return jax.sharding.reshard(a, unsharded(spec))

    def local(a):
        return all_gather(a, sharded_axis(spec), rules.torus, sharding_axes(spec))

    return jax.shard_map(local, in_specs=spec, out_specs=unsharded(spec), check_vma=False)(a)


def _rows_by_device(a: jax.Array, rules: AxisRules) -> jax.Array:
    """Returns [B, T, ...] as [S, B * T / S, ...]: the rows of each of S devices."""
    spec = jax.typeof(a).sharding.spec
    rows = P(*rules("batch", "seq"), *spec[2:])  # positions may be split over tensor as well
    run = jax.shard_map(
        lambda a: a.reshape(1, -1, *a.shape[2:]),
        in_specs=rows,
        out_specs=P(rules.rows, None, *spec[2:]),
    )
    return run(jax.sharding.reshard(a, rows))


def sum_gradient(own: jax.Array, spec: P, rules: AxisRules) -> jax.Array:
    """Returns the sum over the first axis of [S, ...], one array of each device with rows of its
    own, split as `spec` says: a reduce-scatter, then an all-reduce over the other axes, unless it
    is left for later (see `parallel.replicas`)."""
    axes = sharding_axes(spec)
    others = tuple(axis for axis in rules.rows if axis not in axes)

    def local(own):
        return reduce_scatter(own[0], sharded_axis(spec), rules.torus, axes)[None] if axes else own

    split = P(rules.rows, *unsharded(spec))
    run = jax.shard_map(
        local, in_specs=split, out_specs=P(others, *spec.partitions), check_vma=False
    )
    return sum_devices(run(own), spec)
