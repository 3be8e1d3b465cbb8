"""Flash attention on TPU: JAX's Pallas splash kernel behind the signature of `ops.attention`."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from jaxgpt.ops.mask import AttentionMask, Reach
from jaxgpt.system.errors import BadInput

LANES = 128  # blocks are multiples of this; shorter sequences are padded to it
BLOCK = 512  # positions of a block, at most
PADDING = -1  # the segment of what pads a sequence
SAVED = "splash_saved"  # what remat saves so that the forward kernel runs once


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: AttentionMask,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Flash attention over positions 0..T-1 in order, segments or not.

    Blocks that nobody sees are skipped. `interpret` runs the kernel on any device, slowly.

    Raises:
      BadInput: for a mask with a prefix: the kernel's masks are fixed when it is compiled.
    """
    if mask.prefix is not None:
        raise BadInput("splash attention has no prefix: set compute.attention=xla")
    length, more = q.shape[1], -q.shape[1] % LANES

    def laid_out(a):
        return jnp.pad(a, ((0, 0), (0, more), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    arrays = [laid_out(q * scale), laid_out(k), laid_out(v)]
    segments = (mask.q_segments, mask.kv_segments)
    if segments[0] is None and more and not mask.reach.causal:  # else a query sees the padding
        segments = (jnp.zeros_like(mask.q_positions), jnp.zeros_like(mask.kv_positions))
    if segments[0] is not None:
        pad = ((0, 0), (0, more))
        padded = (jnp.pad(a, pad, constant_values=PADDING) for a in segments)
        arrays.append(kernels.SegmentIds(*padded))
    out = jax.vmap(_kernel(length + more, q.shape[2], mask.reach, interpret))(*arrays)
    return out.transpose(0, 2, 1, 3)[:, :length]


def _kernel(length: int, heads: int, reach: Reach, interpret: bool):
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
        _mask(length, heads, reach),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


class PatternMask(masks._ComputableMask):
    """The mask of a pattern (`ops.sparse`), computed in the kernel; nothing of it is stored."""

    def __init__(self, length: int, reach: Reach):
        def visible(q, k):
            seen = reach.pattern.visible(q, k)
            return seen & (k <= q) if reach.causal else seen

        super().__init__((length, length), visible)
        self.reach = reach

    def __eq__(self, other) -> bool:
        return isinstance(other, PatternMask) and (self.shape, self.reach) == (
            other.shape,
            other.reach,
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.reach))


@functools.lru_cache
def _mask(length: int, heads: int, reach: Reach) -> masks.MultiHeadMask:
    shape, back = (length, length), reach.window - 1
    if reach.pattern:
        mask = PatternMask(length, reach)
    elif reach.window:
        mask = masks.LocalMask(shape, (back, 0 if reach.causal else back), 0)
    else:
        mask = masks.CausalMask(shape) if reach.causal else masks.FullMask(shape)
    return masks.MultiHeadMask([mask] * heads)
