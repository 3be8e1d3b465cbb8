"""Products with parameters that are split over `fsdp`: gathered for each pass, gradients scattered."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxgpt.parallel.rules import BATCH_AXES, AxisRules, rowwise, without_fsdp

GATHERED = "gathered_weights"  # what no remat policy keeps: as large as the model


def product(equation: str, x: jax.Array, kernel: jax.Array, out: P, rules: AxisRules) -> jax.Array:
    """Returns einsum(equation, x, kernel in x's dtype and whole over fsdp), [B, T, ...], of sharding
    `out`; "MNH,NHD->MD" is a product over N and H, with M for B and T.

    Its gradient reaches the kernel by reduce-scatter, in x's dtype: each device multiplies its own
    rows, and nothing is summed that is then cut away. Kernels are multiplied and sent as matrices:
    heads as an axis of their own, XLA's TPU compiler makes them a convolution's window.
    """
    summed_over = equation.index(",") - 1
    matrix = _flat(_flat(kernel, 0, summed_over), 1, kernel.ndim)
    y = _product(_flat(x, 2, x.ndim), matrix, P(*out[:3]), rules)
    return jax.lax.reshape(y, (*y.shape[:2], *kernel.shape[summed_over:]), out_sharding=out)


def _flat(a: jax.Array, first: int, end: int) -> jax.Array:
    """Returns `a` with its axes from `first` up to `end` as one, split as the first of them is."""
    spec = jax.typeof(a).sharding.spec
    shape = (*a.shape[:first], math.prod(a.shape[first:end]), *a.shape[end:])
    return jax.lax.reshape(a, shape, out_sharding=P(*spec[: first + 1], *spec[end:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, kernel: jax.Array, out: P, rules: AxisRules) -> jax.Array:
    """`product` of [B, T, I] and a matrix [I, O]."""
    return _forward(x, kernel, out, rules)[0]


def _forward(x, kernel, out, rules):
    whole = checkpoint_name(gathered(kernel.astype(x.dtype), rules), GATHERED)
    return rowwise("MI,IO->MO", x, whole, out), (x, whole, kernel)


def _backward(out, rules, kept, of_y):
    x, whole, kernel = kept
    (of_x,) = jax.vjp(lambda x: rowwise("MI,IO->MO", x, whole, out), x)[1](of_y)
    spec, mesh = jax.typeof(kernel).sharding.spec, jax.sharding.get_abstract_mesh()
    if mesh.shape["fsdp"] == 1 or "fsdp" not in spec:
        (of_whole,) = jax.vjp(lambda w: rowwise("MI,IO->MO", x, w, out), whole)[1](of_y)
        return of_x, jax.sharding.reshard(of_whole, spec).astype(kernel.dtype)
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    own = jnp.einsum(
        "SMI,SMO->SIO",
        _rows_of_each(x, devices),
        _rows_of_each(of_y, devices),
        out_sharding=P(BATCH_AXES, *without_fsdp(kernel)),
    )
    return of_x, summed(own, spec, rules).astype(kernel.dtype)


_product.defvjp(_forward, _backward)


def gathered(a: jax.Array, rules: AxisRules) -> jax.Array:
    """Returns `a` whole over `fsdp`, by an all-gather: of some shapes XLA itself would make a sum of
    arrays that are zero but for a part."""
    spec = jax.typeof(a).sharding.spec
    if "fsdp" not in spec or jax.sharding.get_abstract_mesh().shape["fsdp"] == 1:
        return jax.sharding.reshard(a, without_fsdp(a))
    dim = spec.index("fsdp")

    def local(a):
        return collected(a, dim, rules)

    return jax.shard_map(local, in_specs=spec, out_specs=without_fsdp(a), check_vma=False)(a)


def _rows_of_each(a: jax.Array, devices: int) -> jax.Array:
    """Returns [B, T, ...] as [S, B/S * T, ...]: the rows of each of S devices."""
    spec = jax.typeof(a).sharding.spec
    a = jax.sharding.reshard(a, P(spec[0], None, *spec[2:]))  # positions may be split over tensor
    shape = (devices, a.shape[0] // devices * a.shape[1], *a.shape[2:])
    return jax.lax.reshape(a, shape, out_sharding=P(BATCH_AXES, None, *spec[2:]))


def summed(own: jax.Array, spec: P, rules: AxisRules) -> jax.Array:
    """Returns the sum over the first axis of [S, ...], one array of each device of `BATCH_AXES`, split
    as `spec` says: a reduce-scatter over `fsdp`, and what `data` needs."""
    dim = spec.index("fsdp")

    def local(own):
        return scattered(own[0], dim, rules)[None]

    split = P(BATCH_AXES, *(None if axis == "fsdp" else axis for axis in spec))
    run = jax.shard_map(local, in_specs=split, out_specs=P("data", *spec), check_vma=False)
    return jnp.sum(run(own), axis=0)


def collected(a: jax.Array, dim: int, rules: AxisRules) -> jax.Array:
    """Returns, inside `shard_map`, the parts of all devices of `fsdp` joined along axis `dim`.

    One phase for each axis of the torus: over more than one at once, a TPU's compiler sums arrays
    that are zero but for a part, of all shapes on some tori, of some on others.
    """
    for _, groups in reversed(phases_of(rules)):
        a = jax.lax.all_gather(a, "fsdp", axis=dim, tiled=True, axis_index_groups=groups)
    return a


def scattered(a: jax.Array, dim: int, rules: AxisRules) -> jax.Array:
    """Returns, inside `shard_map`, this device's part of axis `dim` of the sum over `fsdp`.

    One phase for each axis of the torus: over more than one at once, a TPU's compiler would sum
    whole arrays and cut. The parts are an axis of their own: cut from one, square matrices go as
    padded sums and permutes.
    """
    a = jnp.moveaxis(a, dim, 0)
    for parts, groups in phases_of(rules):
        a = a.reshape(parts, a.shape[0] // parts, *a.shape[1:])
        a = jax.lax.psum_scatter(a, "fsdp", scatter_dimension=0, axis_index_groups=groups)
    return jnp.moveaxis(a, 0, dim)


def traded(x: jax.Array, rules: AxisRules) -> jax.Array:
    """Returns [B, T, D], of which each device has its columns of the rows of all devices of `fsdp`,
    as the residual stream: all columns of its own rows. An all-to-all.

    One phase for each axis of the torus: at 256 chips at once a TPU's compiler sits half a minute.
    """
    size = jax.sharding.get_abstract_mesh().shape["fsdp"]
    phases, own = phases_of(rules), rules("batch", "residual", None)
    if not rules.split_batch:  # every device has all rows
        return jax.sharding.reshard(x, own)

    def local(x):
        rows, (*_, length, columns) = x.shape[0] // size, x.shape
        x = x.reshape(*(parts for parts, _ in phases), rows, length, columns)
        for at, (_, groups) in reversed(list(enumerate(phases))):
            x = jax.lax.all_to_all(
                x,
                "fsdp",
                split_axis=at,
                concat_axis=x.ndim - 1,
                tiled=True,
                axis_index_groups=groups,
            )
        return x.reshape(rows, length, columns * size)

    given = rules("looking_up", "residual", "embed")
    return jax.shard_map(local, in_specs=given, out_specs=own)(jax.sharding.reshard(x, given))


def phases_of(rules: AxisRules) -> list[tuple[int, list[list[int]] | None]]:
    """Returns the phases of a scatter over `fsdp` (of a gather, in the reverse order): how many
    devices trade, and the groups that do, each along one axis of the torus; None: all at once."""
    size = jax.sharding.get_abstract_mesh().shape["fsdp"]
    if len(rules.phases) == 1 or math.prod(rules.phases) != size:
        return [(size, None)]
    numbers = np.arange(size).reshape(rules.phases)
    rows = (np.moveaxis(numbers, axis, -1).reshape(-1, n) for axis, n in enumerate(rules.phases))
    return [(groups.shape[1], groups.tolist()) for groups in rows]


def torus_phases(mesh) -> tuple[int, ...]:
    """Returns how many devices `fsdp` has along each axis of the torus that it crosses, (its size,)
    where it does not cross one in order, or the devices stand in no torus."""
    devices = mesh.devices[0, :, 0]
    if len(devices) < 2 or not hasattr(devices[0], "coords"):
        return (len(devices),)
    coords = np.array([device.coords for device in devices])
    lengths = [len(set(column)) for column in coords.T]
    order = [
        d for d in np.argsort([_stride(column) for column in coords.T])[::-1] if lengths[d] > 1
    ]
    sizes = tuple(lengths[d] for d in order)
    if math.prod(sizes) != len(devices):
        return (len(devices),)
    places = np.stack(np.unravel_index(np.arange(len(devices)), sizes), axis=1)
    seen = coords[:, order]
    if any(
        len({(p, c) for p, c in zip(places[:, i], seen[:, i])}) != n for i, n in enumerate(sizes)
    ):
        return (len(devices),)
    return sizes


def _stride(column: np.ndarray) -> int:
    """How many devices in a row share a coordinate."""
    changes = np.flatnonzero(np.diff(column))
    return int(changes[0]) + 1 if len(changes) else len(column) + 1
