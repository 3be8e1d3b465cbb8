"""Relative positions as T5 has them (arXiv:1910.10683, section 2.1): a learned addition to each
head's scores for each bucket of distances."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.config import Config
from jaxgpt.model.layers import INIT_STD
from jaxgpt.ops.mask import AttentionMask
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parameters.weights import normal


class RelativeBias(nnx.Module):
    """A learned addition to each head's scores by the distance from query to key, one for all
    layers."""

    def __init__(self, config: Config, rules: AxisRules, *, causal: bool, rngs: nnx.Rngs):
        cfg, dtype = config.model, jnp.dtype(config.compute.param_dtype)
        self.rules, self.furthest = rules, cfg.relative_max_distance
        self.buckets = causal, cfg.relative_buckets, cfg.relative_max_distance
        shape = cfg.relative_buckets, cfg.num_heads
        self.kernel = normal(rngs, shape, rules(None, "heads"), dtype, INIT_STD)

    def __call__(
        self, queries: Int[Array, "B T"], keys: Int[Array, "B S"]
    ) -> Float[Array, "B N T S"]:
        """Returns the additions for queries and keys at these positions; B is 1 where all rows have
        the same."""
        keys = jax.sharding.reshard(keys, jax.P(*jax.typeof(keys).sharding.spec[:1], None))
        by_distance = self.kernel[...].astype(jnp.float32)[buckets_by_distance(*self.buckets)]
        distance = jnp.clip(keys[:, None] - queries[:, :, None], -self.furthest, self.furthest)
        spec = self.rules("batch" if len(queries) > 1 else None, "seq", None, "heads")
        bias = by_distance.at[distance + self.furthest].get(out_sharding=spec)
        return bias.transpose(0, 3, 1, 2)


def relative_bias(config: Config, rules: AxisRules, **arguments) -> RelativeBias | None:
    """Returns a stack's relative bias, None where the model has other positions."""
    is_relative = config.model.position == "relative"
    return RelativeBias(config, rules, **arguments) if is_relative else None


def bias_of(
    relative: RelativeBias | None, mask: AttentionMask, in_order: bool
) -> Float[Array, "_ N T S"] | None:
    """Returns what is added to the scores under a mask, None without relative positions. `in_order`
    says that every row's positions are 0..T-1."""
    if relative is None:
        return None
    places = jnp.arange(mask.q_positions.shape[1])[None]
    return relative(*((places, places) if in_order else mask[:2]))


def buckets_by_distance(causal: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each distance from -max_distance to max_distance, int32."""
    distances = range(-max_distance, max_distance + 1)
    return np.array([bucket_of(d, causal, buckets, max_distance) for d in distances], np.int32)


def bucket_of(distance: int, causal: bool, buckets: int, max_distance: int) -> int:
    """Returns the bucket of a key `distance` positions after its query (negative: before it).

    Half of a direction's buckets hold one distance each, the others ranges that grow with its
    logarithm, the last all from `max_distance` on. Where queries see both directions, later keys
    have the upper half of the buckets; where they do not, later keys share bucket 0.
    """
    first = 0
    if causal:
        distance = max(-distance, 0)
    else:
        buckets //= 2
        first, distance = (buckets if distance > 0 else 0), abs(distance)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    # The end of a range may be a whole number, which rounding must not move
    return first + min(exact + int(share * (buckets - exact) + 1e-6), buckets - 1)
