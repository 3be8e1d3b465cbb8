"""Quantisation-aware training (arXiv:1712.05877, section 3): weights are trained as floats and read
as what they would be in few bits, rounded to the nearest.

The gradient passes through the rounding as if there were none (straight-through, arXiv:1308.3432):
no weight is clipped, and the scales follow the weights. `shrink` then stores exactly what was read.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxgpt.parallel.fsdp import flat
from jaxgpt.parallel.rules import names
from jaxgpt.parameters.quantised import LARGEST, Format


@jax.custom_jvp
def straight_through(w: Float[Array, "..."], rounded: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `rounded`, whose gradient is w's."""
    return rounded


@straight_through.defjvp
def _(primals, tangents):
    return primals[1], tangents[0].astype(primals[1].dtype)


def read(fmt: Format, w: Float[Array, "..."], axis: int, dtype) -> Float[Array, "..."]:
    """Returns w [I, O] (axis -2) or [V, D] (axis -1) in `dtype`, as `fmt.dequantise` gives it after
    `fmt.quantise`; of int8 and int4."""
    at, shape, spec = w.ndim + axis, w.shape, jax.typeof(w).sharding.spec
    mesh = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(mesh[name] for name in names(spec[at]))
    within = spec if fmt.is_divisible(shape[at], devices) else _whole(spec, at)
    floats = jax.sharding.reshard(jax.lax.stop_gradient(w).astype(jnp.float32), within)
    group = fmt.group or shape[at]
    floats = jnp.pad(floats, [(0, -n % group if i == at else 0) for i, n in enumerate(shape)])
    apart = *shape[:at], floats.shape[at] // group, group, *shape[at + 1 :]
    split = P(*within[: at + 1], None, *within[at + 1 :])
    if not fmt.group:  # one group, over all devices
        split = P(*within[:at], None, *within[at:])
    floats = jax.lax.reshape(floats, apart, out_sharding=split)
    largest = jnp.max(jnp.abs(floats), axis=at + 1, keepdims=True)
    scales = _stored(fmt, largest * jnp.float32(1 / LARGEST[fmt.kind]))
    codes = jnp.rint(floats / jnp.where(scales == 0, 1, scales))
    rounded = codes.astype(dtype) * scales.astype(dtype)
    filled = *shape[:at], apart[at] * group, *shape[at + 1 :]
    rounded = jax.lax.reshape(rounded, filled, out_sharding=within)
    rounded = jax.lax.slice_in_dim(rounded, 0, shape[at], axis=at)
    return straight_through(w, jax.sharding.reshard(rounded, spec))


def _whole(spec: P, at: int) -> P:
    return P(*(None if i == at else name for i, name in enumerate(spec)))


def _stored(fmt: Format, wanted: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `Format.scales_of`'s scales: rounded up to a bfloat16 where they are stored so."""
    if fmt.scale_dtype == jnp.float32:
        return wanted
    nearest = jax.lax.reduce_precision(wanted, exponent_bits=8, mantissa_bits=7)
    bits = jax.lax.bitcast_convert_type(nearest, jnp.uint32) + jnp.uint32(1 << 16)
    above = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(nearest < wanted, above, nearest)


def read_kernel(fmt: Format, kernel: Float[Array, "..."], inputs: int, dtype):
    """Returns a projection's kernel [in..., out...], its first `inputs` axes inputs, as `read`
    gives its matrix."""
    matrix = flat(flat(kernel, 0, inputs), 1, kernel.ndim)
    spec = jax.typeof(kernel).sharding.spec
    return jax.lax.reshape(read(fmt, matrix, -2, dtype), kernel.shape, out_sharding=spec)


@dataclasses.dataclass(frozen=True)
class FakeKernel:
    """A projection's kernel of floats (`floats` is a `FloatKernel`), read rounded."""

    floats: object
    format: Format
    dtype: str  # of what is read

    def make(self, rngs, std: float):
        """Returns the kernel, drawn from N(0, std^2)."""
        return self.floats.make(rngs, std)

    def product(self, equation: str, x, kernel, out: P, rules):
        """Returns einsum(equation, x, kernel), see `parallel.fsdp.product`."""
        return self.floats.product(equation, x, self._read(kernel), out, rules)

    def dense(self, kernel, dtype) -> jax.Array:
        """Returns the kernel in its own shape, as it is read."""
        return self.floats.dense(self._read(kernel), dtype)

    def _read(self, kernel) -> nnx.Param:
        inputs = self.floats.shape.inputs
        return nnx.Param(read_kernel(self.format, kernel[...], inputs, self.dtype))


@dataclasses.dataclass(frozen=True)
class FakeTable:
    """A table of floats (`floats` is a `FloatTable`), read rounded."""

    floats: object
    format: Format
    dtype: str  # of what is read

    def make(self, rngs, spec: P, std: float):
        """Returns the table, drawn from N(0, std^2)."""
        return self.floats.make(rngs, spec, std)

    def lookup(self, table, rows, dtype, out: P):
        """Returns the rows of these numbers, [B, T, D], of sharding `out`."""
        return self.floats.lookup(self._read(table), rows, dtype, out)

    def whole(self, table, dtype):
        """Returns what `rows` reads, unsharded."""
        return self.floats.whole(self._read(table), dtype)

    def rows(self, whole, dtype):
        """Returns the table as a product reads it, from `whole`."""
        return self.floats.rows(whole, dtype)

    def few_logits(self, x, whole, out: P):
        """Returns x times the table in float32, of sharding `out`."""
        return self.floats.few_logits(x, whole, out)

    def mean_row(self, table, count: int):
        """Returns the mean of the first `count` rows in float32, unsharded."""
        return self.floats.mean_row(self._read(table), count)

    def parts(self, table):
        """Returns what `ops.cross_entropy` reads part by part, and how."""
        return self.floats.parts(self._read(table))

    def _read(self, table) -> nnx.Param:
        return nnx.Param(read(self.format, table[...], -1, self.dtype))
