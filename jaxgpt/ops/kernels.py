"""The kernels of attention: XLA's by blocks of queries, on TPU JAX's Pallas splash kernel, on GPU
cuDNN's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float

from jaxgpt.ops.attention import Kernel, xla_attention
from jaxgpt.ops.context.order import zigzag
from jaxgpt.ops.mask import AttentionMask, Reach
from jaxgpt.system.errors import BadInput

QUERIES, MAX_BLOCKS = 64, 8  # of `blocked_attention`: queries of a block at least, blocks at most
LANES = 128  # blocks are multiples of this; shorter sequences are padded to it
BLOCK = 512  # positions of a block, at most
LEAST = 256  # of a pattern of smaller blocks: more of them would be skipped, each run less well
PADDING = -1  # the segment of what pads a sequence
SAVED = "splash_saved"  # what remat saves so that the forward kernel runs once


def blocked_attention(
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
    """`xla_attention` by blocks of queries, each with no other keys than a causal mask may show it.

    Positions must grow along a row, segments or not. More blocks skip more keys, up to half of all,
    and take longer to compile.
    """
    length, reach = q.shape[1], mask.reach
    if not reach.causal or mask.prefix is not None or k.shape[1] != length:
        return xla_attention(q, k, v, mask, kept, bias, scale=scale, dropout=dropout)
    size = max(QUERIES, -(-length // MAX_BLOCKS))
    outs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        queries = slice(start, end)
        keys = slice(max(start - reach.window + 1, 0) if reach.window else 0, end)
        outs.append(
            xla_attention(
                q[:, queries],
                k[:, keys],
                v[:, keys],
                mask.part(queries, keys),
                None if kept is None else kept[:, :, queries, keys],
                None if bias is None else bias[:, :, queries, keys],
                scale=scale,
                dropout=dropout,
            )
        )
    return jnp.concatenate(outs, axis=1)


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Flash attention over positions 0..T-1 in order, segments or not; of keys, as many unless
    every query sees them all.

    Blocks that nobody sees are skipped. `interpret` runs the kernel on any device, slowly.

    Raises:
      BadInput: for a mask with a prefix: the kernel's masks are fixed when it is compiled.
    """
    if mask.prefix is not None:
        raise BadInput("splash attention has no prefix: set compute.attention=xla")
    length = q.shape[1]

    def laid_out(a):
        pad = ((0, 0), (0, -a.shape[1] % LANES), (0, 0), (0, 0))
        return jnp.pad(a, pad).transpose(0, 2, 1, 3)

    arrays = [laid_out(q * scale), laid_out(k), laid_out(v)]
    segments = (mask.q_segments, mask.kv_segments)
    # Without segments a query that sees later keys would see the padding
    if segments[0] is None and k.shape[1] % LANES and not mask.reach.causal:
        segments = (jnp.zeros_like(mask.q_positions), jnp.zeros_like(mask.kv_positions))
    if segments[0] is not None:
        pads = (((0, 0), (0, -a.shape[1] % LANES)) for a in segments)
        padded = (
            jnp.pad(a, pad, constant_values=PADDING) for a, pad in zip(segments, pads, strict=True)
        )
        arrays.append(kernels.SegmentIds(*padded))
    shape = arrays[0].shape[2], arrays[1].shape[2]
    heads, width = q.shape[2:]
    kernel = splash_kernel(shape, heads, mask.reach, width=width, interpret=interpret, name=SAVED)
    out = jax.vmap(kernel)(*arrays)
    return out.transpose(0, 2, 1, 3)[:, :length]


def splash_kernel(
    shape: tuple[int, int],
    heads: int,
    reach: Reach,
    *,
    width: int = LANES,
    interpret: bool = False,
    devices: int = 1,
    name: str | None = None,
    with_logsumexp: bool = False,
) -> kernels.SplashAttentionKernel:
    """Returns splash attention of so many queries and keys, with blocks that divide them.

    Of more than one of `devices` the queries are those of all, for each to take its part: under a
    causal mask in zig-zag order (see `context.order`). `name` is what remat policies call the
    result. Heads of a `width` that does not fill the lanes are read with positions last, so that
    neither memory nor copies are spent on padding.
    """
    most = min(BLOCK, max(reach.pattern.grain, LEAST)) if reach.pattern else BLOCK
    block_q, block_kv = (
        next(b for b in range(min(most, length), 0, -LANES) if length % b == 0)
        for length in (shape[0] // devices, shape[1])
    )
    layouts = kernels.QKVLayout
    narrow = width < LANES and width % 16 == 0  # two rows of bfloat16 to each of 8 sublanes
    layout = layouts.SEQ_MINOR if narrow else layouts.HEAD_DIM_MINOR
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    return kernels.make_splash_mha(
        _mask(shape, heads, reach, devices),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=devices,
        residual_checkpoint_name=name,
        save_residuals=with_logsumexp,
        interpret=interpret,
    )


class ReachMask(masks._ComputableMask):
    """The mask of any reach, computed in the kernel; nothing of it is stored."""

    def __init__(self, shape: tuple[int, int], reach: Reach, devices: int):
        super().__init__(shape, reach.visible)
        self.reach, self.devices = reach, devices
        if reach.causal:
            self.q_sequence = zigzag(self.q_sequence, devices)

    def __getitem__(self, idx) -> np.ndarray:
        """Returns a block of the mask, one element where all are equal: JAX looks at each block of
        a long sequence, most of which a glance at the corners decides."""
        rows, columns = self.q_sequence[idx[0]], idx[1]
        first, last = rows.min(), rows.max()
        start, end = columns.start, columns.stop - 1
        causal, window = self.reach.causal, self.reach.window
        near = not window or (start > last - window and end < first + window)
        if (causal and start > last) or (
            window and (end <= first - window or start >= last + window)
        ):
            return np.zeros((1, 1), bool)
        if near and not (causal and end > first) and not self.reach.pattern:
            return np.ones((1, 1), bool)
        return super().__getitem__(idx)

    def __eq__(self, other) -> bool:
        return isinstance(other, ReachMask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self):
        return self.shape, self.reach, self.devices


@functools.lru_cache
def _mask(shape: tuple[int, int], heads: int, reach: Reach, devices: int) -> masks.MultiHeadMask:
    back = reach.window - 1
    if reach == Reach(causal=False):
        mask = masks.FullMask(shape)
    elif reach.pattern or devices > 1:
        mask = ReachMask(shape, reach, devices)
    elif reach.window:
        mask = masks.LocalMask(shape, (back, 0 if reach.causal else back), 0)
    else:
        mask = masks.CausalMask(shape)
    return masks.MultiHeadMask([mask] * heads)


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Flash attention by cuDNN: 16-bit floats; without segments, positions 0..T-1 in order.

    What cuDNN cannot express (segments, a prefix, a pattern, a window on both sides) goes in as a
    mask [B, 1, T, S], one bit a pair, which it reads as a bias.
    """
    attend = functools.partial(
        jax.nn.dot_product_attention, q, k, v, scale=scale, implementation="cudnn"
    )
    causal, window = mask.reach.causal, mask.reach.window
    parts = (mask.q_segments, mask.prefix, mask.reach.pattern)
    if any(part is not None for part in parts) or (window and not causal):
        return attend(mask=mask.visible()[:, None])
    return attend(is_causal=causal, local_window_size=(window - 1, 0) if window else None)


KERNELS: dict[str, Kernel] = {
    "xla": blocked_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}
