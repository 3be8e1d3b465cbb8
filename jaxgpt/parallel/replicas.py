"""Gradients of devices that hold equal parameters, summed once a step instead of once a microbatch.

Over `data` gradients are summed whole (see `parallel.fsdp`), and it is `data` that goes over slices
of TPUs, whose network is the slowest part of a machine. So with several microbatches each device
adds up its own gradients, and the sum over devices comes last.

JAX's types say so: a parameter that is `reduced` over an axis has a gradient that is `unreduced`,
one that still has to be summed over it. Large matrices are read in ways that leave their gradients
so (`sum_devices`); all other parameters are small, and summed as the microbatch ends.
"""

import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxgpt.config import Config
from jaxgpt.config.schema import REPLICAS
from jaxgpt.system.trees import leaf_path

LARGE = re.compile(r"tokens|head|(\w+/)?blocks/.*(query|key|value|out|gate|up|down)/kernel")


def sum_later(params: dict, config: Config) -> dict:
    """Returns the parameters, the large matrices `reduced` over `REPLICAS` where that spares sums:
    with several microbatches, or another dtype to sum in. Not those inside a pipeline, which has
    microbatches of its own, and not those that are read rounded."""
    shape = jax.sharding.get_abstract_mesh().shape
    axes = frozenset(axis for axis in REPLICAS if shape[axis] > 1)
    wanted = config.grad_accum > 1 or config.compute.slice_gradient_dtype
    if not axes or not wanted or config.compute.fake_quantise != "none":
        return params

    def one(path, a):
        name = leaf_path(path)
        inside = shape["pipeline"] > 1 and "blocks/" in name
        # JAX would leave out the sum over `tensor` of what is looked up at split positions
        looked_up = name == "tokens" and config.mesh.sequence_activations and shape["tensor"] > 1
        spec = jax.typeof(a).sharding.spec
        return (
            a
            if inside or looked_up or not LARGE.fullmatch(name)
            else reshard(a, P(*spec.partitions, reduced=axes))
        )

    return jax.tree.map_with_path(one, params)


def plain(param: jax.Array) -> jax.Array:
    """Returns a parameter that is no longer `reduced`, for the forward pass."""
    return reshard(param, P(*jax.typeof(param).sharding.spec.partitions))


def sum_devices(own: jax.Array, spec: P) -> jax.Array:
    """Returns the sum over the first axis of [S, ...], one array of each device, split as the
    parameter of sharding `spec` is; where that is `reduced`, the sum is left for later."""
    if not spec.reduced:
        return jnp.sum(own, axis=0)
    return jax.lax.reduce_sum(own, (0,), out_sharding=P(*spec.partitions, unreduced=spec.reduced))


def apart(param: jax.Array) -> jax.Array:
    """Returns a parameter that is `reduced` as [S, ...], one for each device that it is reduced
    over, which moves nothing; other parameters as they are. For a `shard_map` whose gradients are
    then not summed over these devices."""
    spec = jax.typeof(param).sharding.spec
    if not spec.reduced:
        return param
    mesh = jax.sharding.get_abstract_mesh().shape
    shape = math.prod(mesh[axis] for axis in spec.reduced), *param.shape
    split = P(tuple(spec.reduced), *spec.partitions)
    return jax.lax.broadcast_in_dim(param, shape, range(1, len(shape)), out_sharding=split)


def zeros_like_gradient(param: jax.Array, dtype) -> jax.Array:
    """Returns zeros of the type of a parameter's gradient."""
    spec = jax.typeof(param).sharding.spec
    if not spec.reduced:
        return jnp.zeros_like(param, dtype)
    zeros = jnp.zeros(param.shape, dtype, out_sharding=P(*spec.partitions))
    return reshard(zeros, P(*spec.partitions, unreduced=spec.reduced))


def scale(gradient: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns a gradient, summed or not, times a number."""
    axes = jax.typeof(gradient).sharding.spec.unreduced
    return gradient * (reshard(factor, P(reduced=axes)) if axes else factor)


def sum_gradients(gradients: dict, dtype: str) -> dict:
    """Returns the gradients, all summed; those that were left for later in `dtype`, or their own
    if that is ""."""

    def one(g):
        spec = jax.typeof(g).sharding.spec
        return (
            reshard(g.astype(dtype or g.dtype), P(*spec.partitions)).astype(g.dtype)
            if spec.unreduced
            else g
        )

    return jax.tree.map(one, gradients)
