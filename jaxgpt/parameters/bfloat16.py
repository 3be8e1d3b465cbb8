"""Products in bfloat16 of a model in float32: what `compute.dtype=bfloat16` means on one CPU.

XLA's CPU backend multiplies in bfloat16 only two such matrices whose sum is float32, and only if
the first has its inner axis last in memory; then it is twice as fast as in float32 on a processor
with avx512_bf16. All else that is bfloat16 it converts to float32 and back, so that a step wholly
in bfloat16 is slower than one in float32. Here the factors of each large product, those of the
projections and the head, are rounded just before it, and the rest is float32: what torch's
autocast does.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxgpt.config import ComputeConfig
from jaxgpt.ops.cross_entropy import FLOATS
from jaxgpt.ops.matmul import Matmul
from jaxgpt.parallel.rules import rowwise

_low = jnp.bfloat16


def product_dtype(compute: ComputeConfig) -> jnp.dtype:
    """Returns the dtype of the factors of large products."""
    return jnp.dtype(_low if compute.matmul == "bfloat16" else compute.dtype)


def _weight(kernel: jax.Array, dtype) -> jax.Array:
    return kernel.astype(_low)


def _forward(x: Float[Array, "B T I"], w: Float[Array, "I O"], out: P) -> Float[Array, "B T O"]:
    return _kept(rowwise("MI,IO->MO", x.astype(_low), w, out, jnp.float32))


def _grad_x(x, w, grad_y, out: P) -> Float[Array, "B T I"]:
    spec = jax.typeof(x).sharding.spec
    return _kept(rowwise("MO,IO->MI", grad_y.astype(_low), w, spec, jnp.float32))


def _grad_w(
    x: Float[Array, "S M I"], grad_y: Float[Array, "S M O"], out: P
) -> Float[Array, "S I O"]:
    """x passes through a reshape and a barrier once it is transposed, or XLA takes the transpose
    into the product, which is then one that it does in float32."""
    turned = _kept(jnp.swapaxes(x.astype(_low), 1, 2)[..., None])[..., 0]
    y = jnp.einsum(
        "SIM,SMO->SIO",
        turned,
        grad_y.astype(_low),
        out_sharding=out,
        preferred_element_type=jnp.float32,
    )
    return _kept(y)


def _kept(a: jax.Array) -> jax.Array:
    """Returns `a`, whose form XLA leaves alone: a transpose of a product's result it would take
    into the product too, and then has no kernel for it."""
    return jax.lax.optimization_barrier(a)


def _grad_rows(grad_logits: Float[Array, "M V"], x: Float[Array, "M D"]) -> Float[Array, "V D"]:
    return _grad_w(grad_logits[None], x[None], P())[0]


BFLOAT16 = Matmul(_weight, _forward, _grad_x, None, _grad_w)
BFLOAT16_ROWS = FLOATS._replace(grad=_grad_rows)
