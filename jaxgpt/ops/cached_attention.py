"""Attention of one query a row over a cache of keys and values, as decoding needs it."""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.ops.mask import AttentionMask, Reach
from jaxgpt.ops.sparse.patterns import Lsh, Pattern
from jaxgpt.parallel.rules import AxisRules


def cached_attention(
    q: Float[Array, "B N H"],
    parts: Sequence[tuple[Float[Array, "B K _ H"], Float[Array, "B K _ H"], Int[Array, "B _"]]],
    position: Int[Array, "B"],
    biases: Sequence[Float[Array, "B N _"]] | None = None,
    *,
    scale: float,
    window: int = 0,
    pattern: Pattern | Lsh | None = None,
    split: str | None = None,
) -> Float[Array, "B N H"]:
    """Returns `ops.attention.xla_attention`, causal, of one query a row over several parts of a
    cache, each its (keys, values, positions) and its bias of the scores; the first part `split`
    over a mesh axis, inside `shard_map`, the others equal on all of its devices."""
    (b, n, h), heads = q.shape, parts[0][0].shape[1]
    reach = Reach(window=window, pattern=pattern)
    q, scores = q.reshape(b, heads, n // heads, h), []
    for i, (k, _, positions) in enumerate(parts):
        mask = AttentionMask(position[:, None], positions, reach=reach)
        visible = mask.visible()[:, None]
        if split and i:  # counted once
            visible &= jax.lax.axis_index(split) == 0
        score = jnp.einsum("BKGH,BKSH->BKGS", q, k, preferred_element_type=jnp.float32) * scale
        if biases is not None:
            score += biases[i].reshape(score.shape)
        scores.append(jnp.where(visible, score, jnp.finfo(jnp.float32).min))
    ends = list(itertools.accumulate(k.shape[2] for k, _, _ in parts[:-1]))
    scores = jnp.concatenate(scores, axis=-1)
    high = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - (jax.lax.pmax(high, split) if split else high))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights /= jax.lax.psum(total, split) if split else total
    weights = jnp.split(weights, ends, axis=-1)
    out = sum(
        jnp.einsum("BKGS,BKSH->BKGH", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, (_, v, _) in zip(weights, parts, strict=True)
    )
    out = jax.lax.psum(out, split) if split else out
    return out.reshape(b, n, h).astype(parts[0][1].dtype)


def sharded_cached(rules: AxisRules, **fixed) -> Callable:
    """Returns `cached_attention` run on each device's own heads; see `ops.attention.sharded`."""
    queries = rules("batch", "heads", None)

    def attend(q, parts, position, biases=None):
        of_parts = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, list(parts))
        split = of_parts[0][2][1]
        kernel = functools.partial(cached_attention, **fixed, split=split)
        specs, arrays = [queries, of_parts, rules("batch")], [q, list(parts), position]
        if biases is not None:
            specs.append([jax.P(*queries[:2], split), *[queries] * (len(parts) - 1)])
            arrays.append(jax.sharding.reshard(list(biases), specs[-1]))
        return jax.shard_map(kernel, in_specs=tuple(specs), out_specs=queries)(*arrays)

    return attend
