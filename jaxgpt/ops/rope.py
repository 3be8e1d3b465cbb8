"""Positions: rotary embeddings and the original sinusoids."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.ops.context.yarn import yarn_frequencies

LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0  # Llama 3.1's low_freq_factor and high_freq_factor


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: str,
    factor: float,
    original_len: int,
    betas: tuple[float, float] = (32.0, 1.0),
) -> np.ndarray:
    """Returns the rotation of each of head_dim/2 pairs in radians per position, float64.

    theta**(-2i/head_dim) (arXiv:2104.09864, eq. 15); `linear` divides all by `factor` (position
    interpolation, arXiv:2306.15595); `llama3` divides those whose wavelength exceeds
    `original_len`, keeps those that turn at least four times within it, and blends between
    (Llama 3.1's release); `yarn` does so by `betas`, see `context.yarn`.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling == "linear":
        return frequencies / factor
    if scaling == "llama3":
        turns = original_len * frequencies / (2 * math.pi)
        kept = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / factor
    if scaling == "yarn":
        return yarn_frequencies(frequencies, theta, factor, original_len, betas)
    return frequencies


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
