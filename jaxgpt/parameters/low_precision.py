"""Products of projections in 8 bits: `compute.matmul=int8|fp8`.

Both factors of a product are cut to 8 bits, each row of the first and each column of the second
with a scale of its own that makes its largest magnitude the largest code: so the scales leave the
sum over the inner axis and multiply the result. The scales are those of the numbers at hand
(dynamic scaling); the weights themselves stay floats. All three products run in 8 bits:

    y      = (x's codes, a scale a row) (w's codes, a scale a column)
    grad_x = (grad_y times w's scales, cut again, a scale a row) (w's codes)^T
    grad_w = (x's codes)^T (grad_y times x's scales, cut again, a scale a column)

Multiplying the gradient by the other factor's scales before it is cut spares a second cut of x and
w, which would have other rows, and makes the gradient that of the product as it was computed; the
rounding has the gradient 1 (straight-through, arXiv:1308.3432). AQT (arXiv:2105.03536) and torchao
run the same three products in int8.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Float

from jaxgpt.ops.matmul import Matmul
from jaxgpt.parallel.rules import names, rowwise
from jaxgpt.system.errors import BadInput

NO_FP8 = "TPU v2", "TPU v3", "TPU v4", "TPU v5", "TPU v6"  # starts of their `device_kind`
FIRST_FP8_GPU = 8.9  # compute capability: Ada; Hopper is 9.0


# The largest codes. e4m3 has 448, but `jax.checkpoint` rounds what it keeps by
# `lax.reduce_precision`, which makes infinities of numbers of the highest exponent
LARGEST = {"int8": 127, "float8_e4m3fn": 240, "float8_e5m2": 57344}


class Kind(NamedTuple):
    """The dtypes of codes of x and w, and of gradients, and that of sums of their products."""

    codes: jnp.dtype
    grad: jnp.dtype
    sums: jnp.dtype


class Codes(NamedTuple):
    """An array in 8 bits: `codes` times `scales`, which have length 1 along the summed axis."""

    codes: jax.Array
    scales: jax.Array


def check_device(matmul: str, device) -> None:
    """Raises `BadInput` if `compute.matmul=matmul` needs products that `device` does not have; a
    CPU computes them by way of floats."""
    capability = float(getattr(device, "compute_capability", FIRST_FP8_GPU))
    if matmul == "fp8" and (device.device_kind.startswith(NO_FP8) or capability < FIRST_FP8_GPU):
        raise BadInput(
            f"compute.matmul=fp8: a {device.device_kind} does not multiply float8; set"
            " compute.matmul=int8"
        )


def quantise(a: Float[Array, "..."], axis: int, dtype, summed: int = 0) -> Codes:
    """Returns `a` as codes of `dtype`, a scale for everything along `axis`.

    A sum of `summed` products of int8 fits int32: beyond 133,144 of them codes are smaller.
    """
    a = a.astype(jnp.float32)
    largest = LARGEST[jnp.dtype(dtype).name]
    if dtype == jnp.int8:
        largest = min(largest, (2**31 - 1) // (largest * max(summed, 1)))
    scales = jnp.max(jnp.abs(a), axis, keepdims=True) * (1 / largest)
    a = a / jnp.where(scales == 0, 1, scales)
    return Codes((jnp.rint(a) if dtype == jnp.int8 else a).astype(dtype), scales)


def _weight(kind: Kind, kernel: Float[Array, "*devices I O"], dtype) -> Codes:
    return quantise(kernel, -2, kind.codes)  # stages give a copy a device, [devices, I, O]


def _forward(kind: Kind, x: Float[Array, "B T I"], w: Codes, out: P) -> Float[Array, "B T O"]:
    codes, scales = _positions_as(out, quantise(x, -1, kind.codes, x.shape[-1]))
    y = rowwise("MI,IO->MO", codes, w.codes, out, kind.sums)
    return (y.astype(jnp.float32) * scales * w.scales[0]).astype(x.dtype)


def _grad_x(kind: Kind, x, w: Codes, grad_y, out: P) -> Float[Array, "B T I"]:
    spec = jax.typeof(x).sharding.spec
    grad_y = quantise(grad_y * w.scales[0], -1, kind.grad, grad_y.shape[-1])
    codes, scales = _positions_as(spec, grad_y)
    grad_x = rowwise("MO,IO->MI", codes, w.codes, spec, kind.sums)
    return (grad_x.astype(jnp.float32) * scales).astype(x.dtype)


def _grad_w(
    kind: Kind, x: Float[Array, "S M I"], grad_y: Float[Array, "S M O"], out: P
) -> Float[Array, "S I O"]:
    codes, scales = quantise(x, -1, kind.codes)
    grad_y = quantise(grad_y * scales, 1, kind.grad, x.shape[1])
    grad_w = jnp.einsum(
        "SMI,SMO->SIO", codes, grad_y.codes, out_sharding=out, preferred_element_type=kind.sums
    )
    return (grad_w.astype(jnp.float32) * grad_y.scales).astype(x.dtype)


def _positions_as(spec: P, a: Codes) -> Codes:
    """Returns codes [B, T, I] and scales with positions split as those of an array of `spec`, but
    for axes that split the codes' inputs: the product scatters its sum over those."""

    def one(a):
        inputs = jax.typeof(a).sharding.spec[2]
        positions = tuple(axis for axis in names(spec[1]) if axis not in names(inputs))
        return reshard(a, P(spec[0], positions or None, inputs))

    return Codes(*map(one, a))


def _matmul(kind: Kind) -> Matmul:
    weight, forward, grad_x, grad_w = (
        functools.partial(part, kind) for part in (_weight, _forward, _grad_x, _grad_w)
    )
    return Matmul(weight, forward, grad_x, None, grad_w)


INT8 = _matmul(Kind(jnp.dtype(jnp.int8), jnp.dtype(jnp.int8), jnp.dtype(jnp.int32)))
# Gradients vary more: e5m2 has 32 powers of two where e4m3 has 18
FP8 = _matmul(
    Kind(jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2), jnp.dtype(jnp.float32))
)
