"""Attention in plain XLA, a block of queries against a block of keys at a time: scores are never
whole, and blocks of which nothing is seen are skipped (arXiv:2205.14135, algorithms 1 and 4)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.ops.mask import AttentionMask

BLOCK = 512  # positions of a block, at most
LOWEST = -1e30  # below every score, and finite


def forward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: AttentionMask,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Returns softmax(q k^T) v over the keys that `mask` shows, and the logsumexp of the scores,
    both in float32 (float64 of float64). Where a query sees nothing, that is `LOWEST` or less."""
    queries, keys = _query_blocks(q, k.shape[1], mask), _key_blocks(k, v, mask)
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=accumulate)

    def row(block):
        q, *q_places = block

        def column(carry, block):
            k, v, *k_places = block
            seen = _seen(mask, q_places, k_places)

            def attend(carry):
                high, total, out = carry
                scores = _scores(q, k, seen, accumulate)
                new_high = jnp.maximum(high, jnp.max(scores, axis=-1))
                p, shrink = jnp.exp(scores - new_high[..., None]), jnp.exp(high - new_high)
                total = total * shrink + jnp.sum(p, axis=-1)
                added = product("BKGTS,BKSH->BKGTH", p.astype(v.dtype), v)
                return new_high, total, out * shrink[..., None] + added

            return jax.lax.cond(jnp.any(seen), attend, lambda carry: carry, carry), None

        zeros = jnp.zeros(q.shape[:-1], accumulate)
        start = zeros + LOWEST, zeros, jnp.zeros(q.shape, accumulate)
        (high, total, out), _ = jax.lax.scan(column, start, keys)
        filled = jnp.where(total == 0, 1, total)
        return out / filled[..., None], high + jnp.log(filled)

    out, lse = jax.lax.map(row, queries)
    return _joined(out, q.shape), _joined(lse, q.shape[:-1])


def backward(q, k, v, mask: AttentionMask, out, lse, grad_out):
    """Returns the gradients of q, k and v in float32 (float64 of float64) of these keys' part of
    an attention whose result over all keys is `out` and whose logsumexp is `lse`."""
    groups, accumulate = k.shape[1], jnp.promote_types(q.dtype, jnp.float32)
    delta = jnp.sum(out.astype(accumulate) * grad_out.astype(accumulate), axis=-1)
    product = functools.partial(jnp.einsum, preferred_element_type=accumulate)
    cut = functools.partial(_blocks_of_heads, groups=groups)
    queries = (*_query_blocks(q, groups, mask), cut(grad_out), cut(lse), cut(delta))

    def column(grad_q, block):
        k, v, *k_places = block

        def row(carry, block):
            (q, *q_places), (grad_out, lse, delta) = block[:-3], block[-3:]
            seen = _seen(mask, q_places, k_places)

            def attend(carry):
                grad_k, grad_v = carry
                p = jnp.exp(_scores(q, k, seen, accumulate) - lse[..., None])
                grad_p = product("BKGTH,BKSH->BKGTS", grad_out, v)
                grad_s = (p * (grad_p - delta[..., None])).astype(q.dtype)
                grad_k += product("BKGTS,BKGTH->BKSH", grad_s, q)
                p = p.astype(q.dtype)
                grad_v += product("BKGTS,BKGTH->BKSH", p, grad_out)
                added = product("BKGTS,BKSH->BKGTH", grad_s, k)
                return (grad_k, grad_v), added

            nothing = jnp.zeros(q.shape, accumulate)
            return jax.lax.cond(jnp.any(seen), attend, lambda carry: (carry, nothing), carry)

        zeros = jnp.zeros(k.shape, accumulate)
        grads, added = jax.lax.scan(row, (zeros, zeros), queries)
        return grad_q + added, grads

    zeros = jnp.zeros(queries[0].shape, accumulate)
    grad_q, (grad_k, grad_v) = jax.lax.scan(column, zeros, _key_blocks(k, v, mask))
    return _joined(grad_q, q.shape), *(_joined(g, k.shape) for g in (grad_k, grad_v))


@jax.custom_vjp
def attend(q, k, v, mask: AttentionMask):
    """Returns `forward`'s result in q's dtype, with `backward` as its gradient."""
    return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q, k, v, mask):
    out, lse = forward(q, k, v, mask)
    out = out.astype(q.dtype)
    return out, (q, k, v, mask, out, lse)


def _attend_backward(saved, grad_out):
    grads = backward(*saved, grad_out)
    return *(g.astype(a.dtype) for g, a in zip(grads, saved, strict=False)), None


attend.defvjp(_attend_forward, _attend_backward)


def _size(length: int) -> int:
    """Returns the positions of a block: the largest divisor of `length` that is at most BLOCK."""
    return next(size for size in range(min(BLOCK, length), 0, -1) if length % size == 0)


def _blocks(a, axis: int):
    """Returns [..., T, ...] as [blocks, ..., T / blocks, ...]."""
    size = _size(a.shape[axis])
    a = a.reshape(*a.shape[:axis], -1, size, *a.shape[axis + 1 :])
    return jnp.moveaxis(a, axis, 0)


def _blocks_of_heads(a, groups: int):
    """Returns [B, N, T, ...] as blocks of [B, K, G, T, ...]."""
    return _blocks(a.reshape(a.shape[0], groups, -1, *a.shape[2:]), 3)


def _query_blocks(q, groups: int, mask: AttentionMask):
    return _blocks_of_heads(q, groups), *_places(mask.q_positions, mask.q_segments)


def _key_blocks(k, v, mask: AttentionMask):
    return _blocks(k, 2), _blocks(v, 2), *_places(mask.kv_positions, mask.kv_segments)


def _places(*arrays):
    return [_blocks(a, 1) for a in arrays if a is not None]


def _seen(mask: AttentionMask, queries, keys):
    positions = queries[0], keys[0]
    segments = (queries[1], keys[1]) if len(queries) > 1 else ()
    return AttentionMask(*positions, *segments, prefix=mask.prefix, reach=mask.reach).visible()


def _scores(q, k, seen, dtype):
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=dtype)
    return jnp.where(seen[:, None, None], scores, 2 * LOWEST)


def _joined(blocks, shape):
    """Returns blocks of [B, K, (G,) T / blocks, ...] as one array of this shape."""
    axis = blocks.ndim - 1 - (len(shape) == 4)
    return jnp.moveaxis(blocks, 0, axis - 1).reshape(shape)
