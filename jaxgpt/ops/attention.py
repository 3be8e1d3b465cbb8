"""Attention: the signature that all of `ops.kernels` have, and the reference."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgpt.config import ModelConfig
from jaxgpt.ops.mask import AttentionMask

Kernel = Callable[..., Float[Array, "B T N H"]]


def xla_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    kept: Bool[Array, "B N T S"] | None = None,
    bias: Float[Array, "#B N T S"] | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scale * q k^T + bias) v over the visible keys: the reference.

    Scores and softmax in float32. Query head n reads key head n // (N/K). `kept` marks the
    attention weights that dropout keeps. Heads are brought in front of positions first: XLA's
    CPU backend multiplies them twice as fast that way, and elsewhere it makes no difference.
    """
    (b, t, n, h), (s, heads) = q.shape, k.shape[1:3]
    groups = n // heads
    q = q.reshape(b, t, heads, groups, h).transpose(0, 2, 3, 1, 4).reshape(b, heads, groups * t, h)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKMH,BKSH->BKMS", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, heads, groups, t, s) * scale
    if bias is not None:
        scores += bias.reshape(-1, heads, groups, t, s)
    visible = mask.visible()[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
    if kept is not None:
        weights = jnp.where(kept.reshape(weights.shape), weights / (1 - dropout), 0)
    weights = weights.astype(v.dtype).reshape(b, heads, groups * t, s)
    out = jnp.einsum("BKMS,BKSH->BKMH", weights, v).reshape(b, heads, groups, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def default_scale(cfg: ModelConfig) -> float:
    """Returns 1/sqrt(H); under muP 1/H (arXiv:2203.03466, definition 4.1), equal at H = 64; 1 where
    scores are not scaled."""
    if not cfg.scale_attention:
        return 1.0
    return 8.0 / cfg.head_dim if cfg.mup_base_width else 1 / math.sqrt(cfg.head_dim)
