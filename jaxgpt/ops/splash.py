"""Flash attention on TPU: JAX's Pallas splash kernel behind the signature of `ops.attention`."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from jaxgpt.ops.places import Places

LANES = 128  # blocks are multiples of this; shorter sequences are padded to it
BLOCK = 512  # positions of a block, at most
RESIDUALS = "splash_residuals"  # what remat saves so that the forward kernel runs once


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    places: Places,
    *,
    scale: float,
    window: int = 0,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal flash attention over positions 0..T-1 in order, segments or not.

    Blocks that nobody sees are skipped. `interpret` runs the kernel on any device, slowly.
    """
    length, more = q.shape[1], -q.shape[1] % LANES

    def laid_out(a):  # padding stands behind, where no query looks
        return jnp.pad(a, ((0, 0), (0, more), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    arrays = [laid_out(q * scale), laid_out(k), laid_out(v)]
    if places.q_segments is not None:
        rows = (places.q_segments, places.kv_segments)
        arrays.append(kernels.SegmentIds(*(jnp.pad(a, ((0, 0), (0, more)), "edge") for a in rows)))
    out = jax.vmap(_kernel(length + more, q.shape[2], window, interpret))(*arrays)
    return out.transpose(0, 2, 1, 3)[:, :length]


def _kernel(length: int, heads: int, window: int, interpret: bool):
    block = next(b for b in range(min(BLOCK, length), 0, -LANES) if length % b == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha(
        _mask(length, heads, window),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )


@functools.lru_cache
def _mask(length: int, heads: int, window: int) -> masks.MultiHeadMask:
    shape = (length, length)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    return masks.MultiHeadMask([mask] * heads)
