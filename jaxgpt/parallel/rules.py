"""The table from logical array axes to mesh axes, and the two reshardings the model needs."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxgpt.config.schema import BATCH_AXES, MESH_AXES, REPLICAS, SHARDING
from jaxgpt.parallel.specs import names, unsharded
from jaxgpt.parallel.torus import Torus

TABLE = {
    **{logical: (name,) for name, axis in MESH_AXES.items() for logical in axis.logical},
    "embed": SHARDING,  # of parameters; activations keep `embed` whole and name it None
    "batch": BATCH_AXES,
    "lookup_batch": REPLICAS,  # of embeddings while `embed` is still split
    "lookup_seq": (),
    "residual": ("context",),  # positions of the residual stream, between the layers
    "head_dim": (),
}


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Maps logical axis names to a `PartitionSpec`: `rules("batch", "seq", None)`.

    `axes` are named, no others: `parallel.mesh.rules_of` has those of more than one device. An axis
    that could split two of an array's axes splits the one that is not `embed`: experts' matrices
    are split by expert.
    `split_batch` says whether activations are split over batch and positions: training splits them,
    while decoding a handful of samples need not have a batch that the mesh divides.
    `split_residual` splits the positions of the residual stream over `tensor`, so that norms and
    what a layer keeps for the backward pass are split too (sequence parallelism, arXiv:2205.05198,
    section 4.2.2).
    """

    axes: tuple[str, ...] = ("data", "fsdp", "tensor", "expert")
    split_batch: bool = True
    split_residual: bool = False
    gathered: bool = False  # kernels come whole, a copy for each device: [devices, ...]
    torus: Torus = ()  # the mesh's, along which collectives over `fsdp` run

    def __call__(self, *logical: str | None) -> P:
        table = TABLE
        if not self.split_batch:
            whole = ("batch", "lookup_batch", "seq", "residual")
            table = table | dict.fromkeys(whole, ())
        elif self.split_residual:
            table = table | {"residual": ("context", "tensor"), "lookup_seq": ("tensor",)}
        taken = {axis for name in logical if name not in (None, "embed") for axis in table[name]}
        table = table | {"embed": [axis for axis in SHARDING if axis not in taken]}
        return P(*(self._used(table[name]) if name else None for name in logical))

    @property
    def rows(self) -> tuple[str, ...]:
        """The axes whose devices have rows or positions of their own."""
        return names(self("batch")[0]) + names(self("seq")[0])

    def _used(self, axes) -> tuple[str, ...] | None:
        return tuple(axis for axis in axes if axis in self.axes) or None


def weight(param: nnx.Param, dtype) -> jax.Array:
    """Returns a parameter as a matrix product wants it: in the compute dtype, whole over the axes
    that split every parameter.

    Casting first halves the all-gather's bytes; its transpose is the gradient's reduce-scatter.
    """
    return whole(param[...].astype(dtype))


def whole(array: jax.Array) -> jax.Array:
    """Returns a parameter whole over the axes that split every parameter."""
    return reshard(array, unsharded(jax.typeof(array).sharding.spec))


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
