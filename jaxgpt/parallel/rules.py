"""The table from logical array axes to mesh axes, and the two reshardings the model needs."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxgpt.config.schema import BATCH_AXES, REPLICAS, SPLIT_BY
from jaxgpt.parallel.torus import Torus

TABLE = {
    **SPLIT_BY,  # parameters; activations keep `embed` whole and name it None
    "batch": BATCH_AXES,
    "lookup_batch": REPLICAS,  # of embeddings while `embed` is still split over fsdp
    "seq": None,
    "residual": None,  # positions of the residual stream, between the layers
    "head_dim": None,
}


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Maps logical axis names to a `PartitionSpec`: `rules("batch", "seq", None)`.

    `split_batch` says whether activations are split over their batch axis: training splits it,
    while decoding a handful of samples need not have a batch that the mesh divides.
    `split_residual` splits the positions of the residual stream over `tensor`, so that norms and
    what a layer keeps for the backward pass are split too (sequence parallelism, arXiv:2205.05198,
    section 4.2.2).
    """

    split_batch: bool = True
    split_residual: bool = False
    torus: Torus = ()  # the mesh's, along which collectives over `fsdp` run

    def __call__(self, *logical: str | None) -> P:
        table = TABLE if self.split_batch else TABLE | {"batch": None, "lookup_batch": None}
        table = table | {"residual": "tensor"} if self.split_residual else table
        return P(*(name and table[name] for name in logical))


def weight(param: nnx.Param, dtype) -> jax.Array:
    """Returns a parameter as a matrix product wants it: in the compute dtype, whole over `fsdp`.

    Casting first halves the all-gather's bytes; its transpose is the gradient's reduce-scatter.
    """
    value = param[...].astype(dtype)
    return reshard(value, without_fsdp(value))


def without_fsdp(array: jax.Array) -> P:
    """Returns an array's sharding, but whole over `fsdp`."""
    return P(*(None if axis == "fsdp" else axis for axis in jax.typeof(array).sharding.spec))


def rowwise(equation: str, x: jax.Array, kernel: jax.Array, out: P, dtype=None) -> jax.Array:
    """Returns einsum(equation, x with its axes B, T as one row axis M, kernel), [B, T, ...].

    `out` is the result's sharding. The product of two plain matrices, forward and backward, spares
    XLA's CPU backend copies of three-dimensional operands (the head of `configs/tiny.py`, both
    passes: 51 ms against 87); elsewhere it is the same program. Where the result's positions are
    split, the two axes cannot become one.
    """
    batch, length = x.shape[:2]
    if out[1] is not None:
        whole = equation.replace("M", "BT")
        return jnp.einsum(whole, x, kernel, out_sharding=out, preferred_element_type=dtype)
    rows = x.reshape(batch * length, *x.shape[2:])
    y = jnp.einsum(
        equation, rows, kernel, out_sharding=P(out[0], *out[2:]), preferred_element_type=dtype
    )
    return jax.lax.reshape(y, (batch, length, *y.shape[1:]), out_sharding=out)
