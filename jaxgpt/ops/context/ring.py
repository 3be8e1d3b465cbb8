"""Ring attention (arXiv:2310.01889): keys and values travel around the devices of `context`.

Each device keeps its queries and attends to one device's keys at a time, while the next ones are on
their way; the results are weighted by the sums of their exponentials. The backward pass is a second
ring, in which the gradients of keys and values travel along, in float32.

With a causal mask in zig-zag order (see `order`) every hop is the same work without a mask: all
queries see the first half of an earlier device's keys and nothing of the second; the second half of
the queries sees all keys of a later device, and the first none.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxgpt.ops.context.order import AXIS
from jaxgpt.ops.mask import AttentionMask, Reach


class Hop(NamedTuple):
    """A kernel: `forward(q, k, v, mask) -> out, logsumexp` and `backward(q, k, v, mask, out,
    logsumexp, grad_out) -> grads of q, k, v`, of arrays [B, heads, T, H] with scaled queries. The
    mask is causal in the order of the arrays, or shows all; segments aside."""

    forward: Callable
    backward: Callable


class Keys(NamedTuple):
    """What travels."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    segments: Int[Array, "B S"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ring(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    mask: AttentionMask,
    hop: Hop,
    name: str,
) -> Float[Array, "B N T H"]:
    """Returns the attention of each device's scaled queries to the keys of all; inside `shard_map`.

    The mask is of the device's own positions: causal and in zig-zag order, or not causal; without
    window, pattern and prefix. `name` is what remat policies call what the backward pass needs.
    """
    return _forward(q, k, v, mask, hop, name)[0]


def _forward(q, k, v, mask, hop, name):
    devices, causal = jax.lax.axis_size(AXIS), mask.reach.causal
    travelling = _send(Keys(k, v, mask.kv_segments))
    out, lse = hop.forward(q, k, v, mask)
    found = out.astype(jnp.promote_types(q.dtype, jnp.float32)), lse

    def visit(i, found, keys: Keys):
        def earlier():
            half = jax.tree.map(_first_of_keys, keys)
            return _merged(found, hop.forward(q, *half[:2], _all_seen(mask, half)))

        def later():
            own = _second(q, 2), _second_queries(mask)
            added = hop.forward(own[0], keys.k, keys.v, _all_seen(own[1], keys))
            merged = _merged(tuple(_second(a, 2) for a in found), added)
            return tuple(_with_second(a, b, 2) for a, b in zip(found, merged, strict=True))

        if not causal:
            return _merged(found, hop.forward(q, keys.k, keys.v, _all_seen(mask, keys)))
        return jax.lax.cond(jax.lax.axis_index(AXIS) >= i, earlier, later)

    def step(i, carry):
        found, keys = carry
        following = _send(keys)
        return visit(i, found, keys), following

    found, keys = _repeat(step, devices - 1, (found, travelling))
    out, lse = visit(devices - 1, found, keys)
    out, lse = checkpoint_name(out.astype(q.dtype), name), checkpoint_name(lse, name)
    return out, (q, k, v, mask, out, lse)


def _backward(hop, name, saved, grad_out):
    q, k, v, mask, out, lse = saved
    devices, causal = jax.lax.axis_size(AXIS), mask.reach.causal
    travelling = _send(Keys(k, v, mask.kv_segments))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grads = [g.astype(wide) for g in hop.backward(q, k, v, mask, out, lse, grad_out)]

    def visit(i, grads, keys: Keys):
        """Adds to the gradient of the queries, and of the keys that are here now."""

        def earlier():
            half = jax.tree.map(_first_of_keys, keys)
            own = q, *half[:2], _all_seen(mask, half), out, lse, grad_out
            grad_q, *of_keys = hop.backward(*own)
            halves = (
                _with_first(g, _first(g, 2) + a, 2) for g, a in zip(grads[1:], of_keys, strict=True)
            )
            return [grads[0] + grad_q, *halves]

        def later():
            seen = _all_seen(_second_queries(mask), keys)
            rest = (_second(a, 2) for a in (out, lse, grad_out))
            grad_q, *of_keys = hop.backward(_second(q, 2), keys.k, keys.v, seen, *rest)
            grad_q = _with_second(grads[0], _second(grads[0], 2) + grad_q, 2)
            return [grad_q, *(g + a for g, a in zip(grads[1:], of_keys, strict=True))]

        if not causal:
            own = q, keys.k, keys.v, _all_seen(mask, keys), out, lse, grad_out
            return [g + a for g, a in zip(grads, hop.backward(*own), strict=True)]
        return jax.lax.cond(jax.lax.axis_index(AXIS) >= i, earlier, later)

    def step(i, carry):
        (grad_q, *of_keys), keys = carry
        following = _send(keys)
        return visit(i, [grad_q, *_send(of_keys)], keys), following

    grads, keys = _repeat(step, devices - 1, (grads, travelling))
    grad_q, *of_keys = visit(devices - 1, [grads[0], *_send(grads[1:])], keys)
    grads = grad_q, *_send(of_keys)
    return *(g.astype(a.dtype) for g, a in zip(grads, (q, k, v), strict=True)), None


ring.defvjp(_forward, _backward)


def _repeat(step, end: int, carry):
    """Returns the carry after the hops before the last. On a CPU not in a loop: XLA would run its
    collectives beside those outside, in another order on each device, and they would wait for each
    other for ever."""
    if jax.sharding.get_abstract_mesh().abstract_device.platform == "cpu":
        for i in range(1, end):
            carry = step(i, carry)
        return carry
    return jax.lax.fori_loop(1, end, step, carry) if end > 1 else carry


def _send(tree):
    """Returns what the device before this one has."""
    devices = jax.lax.axis_size(AXIS)
    pairs = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, pairs), tree)


def _merged(one, two):
    """Returns the attention to two sets of keys, and its logsumexp, from those to each."""
    (out_1, lse_1), (out_2, lse_2) = one, two
    lse = jnp.logaddexp(lse_1, lse_2)
    weights = (jnp.exp(part - lse)[..., None] for part in (lse_1, lse_2))
    return sum(w * out for w, out in zip(weights, (out_1, out_2), strict=True)), lse


def _all_seen(mask: AttentionMask, keys: Keys) -> AttentionMask:
    """Returns the mask of its queries and other keys, of which they see their segment's."""
    shape = keys.k.shape[0], keys.k.shape[2]
    places = mask.q_positions, jnp.zeros(shape, jnp.int32), mask.q_segments, keys.segments
    return AttentionMask(*places, reach=Reach(causal=False))


def _second_queries(mask: AttentionMask) -> AttentionMask:
    segments = None if mask.q_segments is None else _second(mask.q_segments, 1)
    return mask._replace(q_positions=_second(mask.q_positions, 1), q_segments=segments)


def _first_of_keys(a):
    return _first(a, 2 if a.ndim == 4 else 1)


def _first(a, axis: int):
    return jax.lax.slice_in_dim(a, 0, a.shape[axis] // 2, axis=axis)


def _second(a, axis: int):
    return jax.lax.slice_in_dim(a, a.shape[axis] // 2, a.shape[axis], axis=axis)


def _with_first(a, half, axis: int):
    return jax.lax.dynamic_update_slice_in_dim(a, half, 0, axis)


def _with_second(a, half, axis: int):
    return jax.lax.dynamic_update_slice_in_dim(a, half, half.shape[axis], axis)
