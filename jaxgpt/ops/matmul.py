"""How a projection multiplies: the product and the two products of its gradient.

Gathering the weight and scattering its gradient is `parallel.fsdp`'s business. A kind that
multiplies in fewer bits replaces these functions and nothing else.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxgpt.parallel.rules import rowwise


class Matmul(NamedTuple):
    """x k and its gradients, for x [B, T, I], a kernel k [I, O] and y [B, T, O] of sharding `out`.

    `weight(k, dtype) -> w`: what is gathered and multiplied, an array or several
    `forward(x, w, out) -> y`
    `grad_x(x, w, grad_y, out) -> [B, T, I]`
    `grad_w(x, w, grad_y, out) -> [I, O]`, summed over all devices by XLA; None: by device as well
    `grad_w_by_device(x [S, M, I], grad_y [S, M, O], out) -> [S, I, O]`: of each device's own rows
    """

    weight: Callable
    forward: Callable[..., jax.Array]
    grad_x: Callable[..., jax.Array]
    grad_w: Callable[..., jax.Array] | None
    grad_w_by_device: Callable[..., jax.Array]


def _forward(x: Float[Array, "B T I"], w: Float[Array, "I O"], out: P) -> Float[Array, "B T O"]:
    return rowwise("MI,IO->MO", x, w, out)


def _grad_x(x, w, grad_y, out: P) -> Float[Array, "B T I"]:
    return jax.vjp(lambda x: _forward(x, w, out), x)[1](grad_y)[0]


def _grad_w(x, w, grad_y, out: P) -> Float[Array, "I O"]:
    return jax.vjp(lambda w: _forward(x, w, out), w)[1](grad_y)[0]


def _grad_w_by_device(
    x: Float[Array, "S M I"], grad_y: Float[Array, "S M O"], out: P
) -> Float[Array, "S I O"]:
    return jnp.einsum("SMI,SMO->SIO", x, grad_y, out_sharding=out)


def _weight(kernel: jax.Array, dtype) -> jax.Array:
    return kernel.astype(dtype)


PLAIN = Matmul(_weight, _forward, _grad_x, _grad_w, _grad_w_by_device)
