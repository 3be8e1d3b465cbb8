"""Sparse attention in plain XLA: blocks of queries against the blocks of keys that they may see.

Work and memory grow with the pairs that are seen. Each part of a pattern has its own softmax over
the keys that no earlier part has; the results are weighted by the sums of their exponentials.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.ops.mask import AttentionMask
from jaxgpt.ops.sparse.patterns import Layout
from jaxgpt.system.errors import BadInput

NONE = -1  # the position of what is no key
MASKED = jnp.finfo(jnp.float32).min


def gathered_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: AttentionMask,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Returns `ops.attention.xla_attention` for a mask with a pattern, without the keys that it
    leaves out.

    Positions are 0..T-1 in order. Where a pattern looks the same from every position (windows,
    strides), they may also start anew with each segment.

    Raises:
      BadInput: for a mask with a prefix.
    """
    check_no_prefix(mask)
    pattern, causal = mask.reach.pattern, mask.reach.causal
    (b, t, n, h), heads = q.shape, k.shape[2]
    q = q.reshape(b, t, heads, n // heads, h).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    q_places, k_places = places(mask)
    parts = []
    for i, part in enumerate(pattern.parts):

        def seen(q_places, k_places, part=part, earlier=pattern.parts[:i]):
            (q_at, q_segment), (k_at, k_segment) = q_places, k_places
            allowed = part.covers(q_at, k_at) & (k_at != NONE) & (q_segment == k_segment)
            allowed = allowed & (k_at <= q_at) if causal else allowed
            for other in earlier:
                allowed &= ~other.covers(q_at, k_at)
            return allowed

        layout = part.layout(t, causal)
        if layout is None:
            keys = (k[:, :, : part.count], v[:, :, : part.count])
            allowed = seen(_across(q_places), _along(k_places[..., : part.count]))
            parts.append(softmax_part(q, *keys, allowed[:, None, None], scale))
        else:
            parts.append(_blocks(q, k, v, q_places, k_places, layout, seen, scale))
    out = merge(parts)
    if first := min(pattern.first, t):
        same = q_places[:, 1, :first, None] == k_places[:, 1, None, :]
        all_keys, _ = softmax_part(q[..., :first, :], k, v, same[:, None, None], scale)
        out = jnp.concatenate([all_keys, out[..., first:, :]], axis=-2)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(v.dtype)


def check_no_prefix(mask: AttentionMask) -> None:
    """Raises `BadInput` if a mask has a prefix, in which the patterns do not hold."""
    if mask.prefix is not None:
        raise BadInput("sparse attention has no prefix: set model.attention_pattern=full")


def places(mask: AttentionMask) -> tuple[Int[Array, "B 2 T"], Int[Array, "B 2 S"]]:
    """Returns the positions and segments of the queries and of the keys."""
    q, k = mask.q_positions, mask.kv_positions
    segments = (mask.q_segments, mask.kv_segments)
    q_segments, k_segments = (q * 0, k * 0) if segments[0] is None else segments
    return jnp.stack([q, q_segments], 1), jnp.stack([k, k_segments], 1)


def softmax_part(
    q: Float[Array, "B K G *n T H"],
    k: Float[Array, "B K *n S H"],
    v: Float[Array, "B K *n S H"],
    allowed: Bool[Array, "B _ 1 *n T S"],
    scale: float,
    penalty: Float[Array, "..."] | float = 0.0,
) -> tuple[Float[Array, "B K G *n T H"], Float[Array, "B K G *n T"]]:
    """Returns softmax(scale * q k^T - penalty) v over the allowed keys, in float32, and the
    logarithm of the sum of the exponentials, which is very negative where none is allowed."""
    scores = jnp.einsum("BKG...TH,BK...SH->BKG...TS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed, scores * scale - penalty, MASKED)
    most = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - most)
    total = weights.sum(axis=-1, keepdims=True)
    weights = (weights / total).astype(v.dtype)
    out = jnp.einsum("BKG...TS,BK...SH->BKG...TH", weights, v, preferred_element_type=jnp.float32)
    return out, (most + jnp.log(total))[..., 0]


def merge(parts: list) -> Float[Array, "*n T H"]:
    """Returns the softmax over the keys of all parts, each (result, logarithm of its sum)."""
    outs, logs = (jnp.stack(arrays) for arrays in zip(*parts, strict=True))
    return (jax.nn.softmax(logs, axis=0)[..., None] * outs).sum(axis=0)


def _blocks(q, k, v, q_places, k_places, layout: Layout, seen, scale: float):
    """Returns `softmax_part` of one part of a pattern, its queries in order again."""
    length = q.shape[-2]
    fold = functools.partial(_fold, layout=layout)
    q, k, v = fold(q, axis=3), fold(k, axis=2), fold(v, axis=2)
    q_places, k_places = (fold(a, axis=2, fill=NONE) for a in (q_places, k_places))
    keys, values = _gather(k, layout.keys, 2), _gather(v, layout.keys, 2)
    allowed = seen(_across(q_places), _along(_gather(k_places, layout.keys, 2, fill=NONE)))
    results = softmax_part(q, keys, values, allowed[:, None, None], scale)
    return tuple(_unfold(a, layout, length) for a in results)


def _fold(x: Array, *, layout: Layout, axis: int, fill: int = 0) -> Array:
    """Returns x with `axis`, the positions, in two: blocks, and the positions of a block."""
    phases, block = layout.phases, layout.block
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -x.shape[axis] % (phases * block))
    x = jnp.pad(x, pads, constant_values=fill)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if phases > 1:
        x = x.reshape(*before, -1, phases, *after).swapaxes(axis, axis + 1)
    return x.reshape(*before, -1, block, *after)


def _unfold(x: Array, layout: Layout, length: int) -> Array:
    """Returns x [B K G blocks block ...] with the first `length` positions in one axis again."""
    before, after = x.shape[:3], x.shape[5:]
    if layout.phases > 1:
        x = x.reshape(*before, layout.phases, -1, *after).swapaxes(3, 4)
    return x.reshape(*before, -1, *after)[:, :, :, :length]


def _gather(x: Array, keys: tuple, axis: int, fill: int = 0) -> Array:
    """Returns, for each block along `axis`, those that `keys` names, one after the other."""
    found = [_named_by(x, name, axis, fill) for name in keys]
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=axis + 1)


def _named_by(x: Array, name, axis: int, fill: int) -> Array:
    """Distances are slices, whose gradients are no scatters."""
    count = x.shape[axis]
    if not isinstance(name, int):
        taken = jnp.take(x, name, axis=axis, mode="clip")
        there = (name >= 0).reshape(-1, *(1,) * (x.ndim - axis - 1))
        return jnp.where(there, taken, fill)
    pads = [(0, 0)] * x.ndim
    pads[axis] = (max(-name, 0), max(name, 0))
    start = max(name, 0)
    padded = jnp.pad(x, pads, constant_values=fill)
    return jax.lax.slice_in_dim(padded, start, start + count, axis=axis)


def _across(places: Int[Array, "B 2 *n T"]) -> tuple[Array, Array]:
    """Returns positions and segments of queries, to be compared with those of keys."""
    return places[:, 0, ..., None], places[:, 1, ..., None]


def _along(places: Int[Array, "B 2 *n S"]) -> tuple[Array, Array]:
    return places[:, 0, ..., None, :], places[:, 1, ..., None, :]
