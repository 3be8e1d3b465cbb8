"""The kernels of attention: XLA's by blocks of queries, on TPU JAX's Pallas splash kernel, on GPU
cuDNN's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float

from jaxgpt.ops.attention import Kernel
from jaxgpt.ops.context.order import zigzag
from jaxgpt.ops.mask import AttentionMask, Reach
from jaxgpt.system.errors import BadInput

QUERIES, MAX_BLOCKS = 64, 8  # of `blocked_attention`: queries of a block at least, blocks at most
LANES = 128  # blocks are multiples of this; shorter sequences are padded to it
BLOCK = 512  # positions of a block, at most
LEAST = 256  # of a pattern of smaller blocks: more of them would be skipped, each run less well
PADDING = -1  # the segment of what pads a sequence
HIDDEN = np.finfo(np.float32).min  # the score of a key that a query does not see
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
    and take longer to compile. Weights are not kept for the backward pass, which makes those of a
    block again from two numbers a query (FlashAttention, arXiv:2205.14135, section 3.1).
    """
    return _blocked(q, k, v, bias, mask, kept, scale, dropout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _blocked(q, k, v, bias, mask, kept, scale, dropout):
    return _blocked_forward(q, k, v, bias, mask, kept, scale, dropout)[0]


def _blocked_forward(q, k, v, bias, mask, kept, scale, dropout):
    heads, outs, sums = k.shape[2], [], []
    keys, values = _heads_first(k, heads), _heads_first(v, heads)
    for part in _blocks(q, k, mask):
        scores = _scores(q, keys, bias, mask, part, scale)
        high = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - high)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = _dropped(weights, kept, part, dropout).astype(v.dtype)
        out = _product("BKMS,BKSH->BKMH", weights, values[:, :, part[1]]) / total
        outs.append(_heads_last(out, q[:, part[0]]))
        sums.append((checkpoint_name(high, SAVED), checkpoint_name(total, SAVED)))
    out = checkpoint_name(jnp.concatenate(outs, axis=1), SAVED)
    return out, (q, k, v, bias, mask, kept, out, sums)


def _blocked_backward(scale, dropout, saved, grad_out):
    q, k, v, bias, mask, kept, out, sums = saved
    heads, grads_q = k.shape[2], []
    keys, values = _heads_first(k, heads), _heads_first(v, heads)
    grad_k, grad_v = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    grad_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    for part, (high, total) in zip(_blocks(q, k, mask), sums, strict=True):
        rows, columns = part
        weights = jnp.exp(_scores(q, keys, bias, mask, part, scale) - high) * (1 / total)
        grad, of_out = (_heads_first(a[:, rows], heads) for a in (grad_out, out))
        delta = jnp.sum(grad.astype(jnp.float32) * of_out, axis=-1, keepdims=True)
        grad_weights = _product("BKMH,BKSH->BKMS", grad, values[:, :, columns])
        grad_scores = weights * (_dropped(grad_weights, kept, part, dropout) - delta)
        grad_scores = jnp.where(high > HIDDEN, grad_scores, 0)  # not of queries that see no key
        if bias is not None:
            by_head = grad_scores.reshape(-1, *bias[:, :, rows, columns].shape[1:])
            summed = jnp.sum(by_head.reshape(-1, bias.shape[0], *by_head.shape[1:]), axis=0)
            grad_bias = grad_bias.at[:, :, rows, columns].set(summed)
        grad_scores = (grad_scores * scale).astype(q.dtype)
        weights = _dropped(weights, kept, part, dropout).astype(v.dtype)
        grad_q = _product("BKMS,BKSH->BKMH", grad_scores, keys[:, :, columns])
        grads_q.append(_heads_last(grad_q, q[:, rows]))
        queries = _heads_first(q[:, rows], heads)
        added = _product("BKMS,BKMH->BKSH", grad_scores, queries)
        grad_k = grad_k.at[:, :, columns].add(added)
        added = _product("BKMS,BKMH->BKSH", weights, grad)
        grad_v = grad_v.at[:, :, columns].add(added)
    grad_bias = None if bias is None else grad_bias.astype(bias.dtype)
    grads = jnp.concatenate(grads_q, axis=1), _heads_last(grad_k, k), _heads_last(grad_v, v)
    return *grads, grad_bias, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocks(q, k, mask: AttentionMask) -> list[tuple[slice, slice]]:
    """Returns the queries of each block, and which keys they may see."""
    (length, num_keys), reach = (q.shape[1], k.shape[1]), mask.reach
    if not reach.causal or mask.prefix is not None or num_keys != length:
        return [(slice(0, length), slice(0, num_keys))]
    size, found = max(QUERIES, -(-length // MAX_BLOCKS)), []
    for start in range(0, length, size):
        end = min(start + size, length)
        first = max(start - reach.window + 1, 0) if reach.window else 0
        found.append((slice(start, end), slice(first, end)))
    return found


def _scores(q, keys, bias, mask: AttentionMask, part, scale: float) -> Float[Array, "B K M S"]:
    """Returns a block's masked scores, the queries of a key's heads as one axis."""
    rows, columns = part
    keys = keys[:, :, columns]
    scores = _product("BKMH,BKSH->BKMS", _heads_first(q[:, rows], keys.shape[1]), keys) * scale
    if bias is not None:
        own = bias[:, :, rows, columns]
        scores += own.reshape(own.shape[0], scores.shape[1], -1, scores.shape[-1])
    visible = mask.part(rows, columns).visible()[:, None]
    visible = jnp.tile(visible, (1, 1, scores.shape[2] // visible.shape[2], 1))
    return jnp.where(visible, scores, HIDDEN)


def _dropped(weights, kept, part, dropout: float) -> Float[Array, "B K M S"]:
    """Returns a block's weights with those that dropout does not keep zeroed."""
    if kept is None:
        return weights
    return jnp.where(kept[:, :, *part].reshape(weights.shape), weights / (1 - dropout), 0)


def _heads_first(a: Float[Array, "B T N H"], heads: int) -> Float[Array, "B K M H"]:
    """Returns `a` with heads in front of positions, those that read one of so many key heads as one
    axis: XLA's CPU backend multiplies them twice as fast that way."""
    b, t, n, h = a.shape
    a = a.reshape(b, t, heads, n // heads, h).transpose(0, 2, 3, 1, 4)
    return a.reshape(b, heads, -1, h)


def _heads_last(a: Float[Array, "B K M H"], like: Float[Array, "B T N H"]):
    """Returns the inverse of `_heads_first`, in the dtype of `like`."""
    (b, t, n, h), heads = like.shape, a.shape[1]
    a = a.reshape(b, heads, n // heads, t, h).transpose(0, 3, 1, 2, 4)
    return a.reshape(like.shape).astype(like.dtype)


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
