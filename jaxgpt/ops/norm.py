"""Normalisation over the last axis: computed in float32, returned in the input's dtype.

The backward pass computes again what is cheap, so that of each call only its input is kept.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"] | None, eps: float
) -> Float[Array, "*B D"]:
    """Returns (x - mean) / sqrt(var + eps) * scale + bias (arXiv:1607.06450, eq. 4).

    The variance is the biased one.
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + eps) * scale
    return (normed if bias is None else normed + bias).astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """Returns x / sqrt(mean(x**2) + eps) * scale (arXiv:1910.07467, eq. 4)."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)
