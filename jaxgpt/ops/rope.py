"""Positions: rotary embeddings and the original sinusoids."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    frequencies: Sequence[float],
    factor: float = 1.0,
) -> Float[Array, "B T N H"]:
    """Returns x with each pair (x[i], x[i + H/2]) turned by position * frequency and multiplied by
    `factor`, in float32."""
    angles = positions[:, :, None, None] * jnp.asarray(frequencies, jnp.float32)
    cos, sin = factor * jnp.cos(angles), factor * jnp.sin(angles)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (x1 * cos - x2 * sin, x2 * cos + x1 * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def sinusoids(positions: Int[Array, "B T"], dim: int) -> Float[Array, "B T D"]:
    """Returns sin and cos of position / 10000**(2i/dim), interleaved (arXiv:1706.03762, 3.5)."""
    frequencies = 10_000.0 ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    angles = positions[:, :, None] * jnp.asarray(frequencies, jnp.float32)
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(*positions.shape, -1)[..., :dim]
