"""Attention of a decoder's tokens to an encoder's output."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxgpt.config import Config
from jaxgpt.model.layers import NORMS, Linear, hidden_std, residual_std
from jaxgpt.ops.attention import default_scale
from jaxgpt.ops.cache import UNWRITTEN, KeysValues
from jaxgpt.ops.cached_attention import sharded_cached
from jaxgpt.ops.context.order import exchanged
from jaxgpt.ops.context.sharded import sharded
from jaxgpt.ops.kernels import KERNELS
from jaxgpt.ops.mask import AttentionMask, Reach
from jaxgpt.parallel.rules import AxisRules


class CrossAttention(nnx.Module):
    """Multi-head attention whose queries come from the decoder, keys and values from the encoder's
    output, the memory (arXiv:1706.03762, section 3.2.3). It has no positions."""

    def __init__(self, config: Config, rules: AxisRules, kernel: str, *, rngs: nnx.Rngs):
        cfg = config.model
        self.rules, self.dropout, self.num_heads = rules, cfg.dropout, cfg.num_heads
        scale = default_scale(cfg)
        method = config.compute.context_attention
        attend = functools.partial(sharded, rules=rules, method=method, scale=scale)
        self.attend = attend(KERNELS[kernel])
        self.attend_cached = sharded_cached(rules, scale=scale)
        self.attend_dropping = attend(KERNELS["xla"], dropout=cfg.dropout)
        shared = dict(bias=cfg.bias or cfg.qkv_bias, std=hidden_std(cfg), rngs=rngs)
        self.query = Linear("query", "MD,DNH->MNH", config, rules, **shared)
        self.key = Linear("key", "MD,DKH->MKH", config, rules, **shared)
        self.value = Linear("value", "MD,DKH->MKH", config, rules, **shared)
        self.out = Linear(
            "out", "MNH,NHD->MD", config, rules, bias=cfg.bias, std=residual_std(cfg), rngs=rngs
        )
        norm = NORMS[cfg.norm]
        self.query_norm = norm(config, cfg.head_dim) if cfg.qk_norm else lambda x: x
        self.key_norm = norm(config, cfg.head_dim) if cfg.qk_norm else lambda x: x

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B S D"],
        mask: AttentionMask,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns x attended to `memory`; with a `key`, dropout drops attention weights."""
        q, k, v = (
            self.query_norm(self.query(x)),
            self.key_norm(self.key(memory)),
            self.value(memory),
        )
        with jax.named_scope("cross_attention"):
            if key is None or self.dropout == 0:
                return self.out(self.attend(q, k, v, mask))
            shape = x.shape[0], self.num_heads, x.shape[1], memory.shape[1]
            spec = self.rules("batch", "heads", "seq", None)
            kept = jax.random.bernoulli(key, 1 - self.dropout, shape, out_sharding=spec)
            kept = exchanged(kept, Reach(), axis=2)  # a decoder's queries
            return self.out(self.attend_dropping(q, k, v, mask, kept))

    def keys_values(self, memory: Float[Array, "B S D"]) -> KeysValues:
        """Returns the keys and values of the memory, computed once for all tokens of a text."""
        k, v = self.key_norm(self.key(memory)), self.value(memory)
        return KeysValues(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))

    def read(
        self, x: Float[Array, "B T D"], cached: KeysValues, segments: Int[Array, "B S"]
    ) -> Float[Array, "B T D"]:
        """Returns x attended to cached keys and values, but those of segment 0, which is
        padding."""
        q = self.query_norm(self.query(x))
        if x.shape[1] == 1:
            slots = jnp.where(segments == 0, UNWRITTEN, 0)
            parts = [(*cached, slots)]
            return self.out(
                self.attend_cached(q[:, 0], parts, jnp.zeros_like(slots[:, 0]))[:, None]
            )
        mask = memory_mask(x.shape[1], jnp.minimum(segments, 1), None, self.rules)
        k, v = (a.transpose(0, 2, 1, 3) for a in cached)
        return self.out(self.attend(q, k, v, mask))


def memory_mask(
    length: int,
    source_segments: Int[Array, "B S"],
    segments: Int[Array, "B T"] | None,
    rules: AxisRules,
) -> AttentionMask:
    """Returns which of the source's tokens the decoder's `length` tokens see: those of the segment
    of the same number; without `segments`, those of segment 1."""
    batch, sources = source_segments.shape
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    positions = (jnp.broadcast_to(jnp.arange(n), (batch, n)) for n in (length, sources))
    mask = AttentionMask(*positions, segments, source_segments, reach=Reach(causal=False))
    return jax.sharding.reshard(mask, rules("batch", "seq"))
