"""Multi-head and grouped-query self-attention."""

import functools

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.config import Config, ModelConfig
from jaxgpt.model.layers import NORMS, Linear, hidden_std, residual_std
from jaxgpt.ops.attention import default_scale
from jaxgpt.ops.context.frequencies import attention_factor, rope_frequencies
from jaxgpt.ops.context.order import exchanged
from jaxgpt.ops.context.sharded import sharded
from jaxgpt.ops.kernels import KERNELS
from jaxgpt.ops.mask import AttentionMask
from jaxgpt.ops.rope import rotate
from jaxgpt.ops.sparse.kernels import SPARSE_KERNELS, sparse_kernel
from jaxgpt.ops.sparse.lsh import unit_length
from jaxgpt.ops.sparse.patterns import Lsh, patterns_of
from jaxgpt.parallel.dropout import Key, draw_kept
from jaxgpt.parallel.rules import AxisRules


class Attention(nnx.Module):
    """Self-attention (arXiv:1706.03762, section 3.2), heads split over `tensor`.

    Key heads may be fewer than query heads (arXiv:2305.13245). `kernel` names the implementation.
    """

    def __init__(
        self, config: Config, rules: AxisRules, kernel: str, window: int, *, rngs: nnx.Rngs
    ):
        cfg = config.model
        self.rules, self.dropout, self.num_heads = rules, cfg.dropout, cfg.num_heads
        self.window, self.scale = window, default_scale(cfg)
        self.patterns = patterns_of(cfg)
        either = self.patterns[0]
        attend = SPARSE_KERNELS[sparse_kernel(kernel, either)] if either else KERNELS[kernel]
        given = dict(rules=rules, method=config.compute.context_attention, scale=self.scale)
        self.attend = sharded(attend, **given)
        hashes = isinstance(either, Lsh)  # not in decoding: see `ops.sparse.lsh`
        self.attend_start = sharded(KERNELS["xla"] if hashes else attend, **given)
        self.attend_dropping = sharded(KERNELS["xla"], **given, dropout=cfg.dropout)
        shared = dict(bias=cfg.bias or cfg.qkv_bias, std=hidden_std(cfg), rngs=rngs)
        self.query = Linear("query", "MD,DNH->MNH", config, rules, **shared)
        self.key = None if hashes else Linear("key", "MD,DKH->MKH", config, rules, **shared)
        self.value = Linear("value", "MD,DKH->MKH", config, rules, **shared)
        self.out = Linear(
            "out", "MNH,NHD->MD", config, rules, bias=cfg.bias, std=residual_std(cfg), rngs=rngs
        )
        norm = NORMS[cfg.norm]
        self.query_norm = norm(config, cfg.head_dim) if cfg.qk_norm else _identity
        self.key_norm = norm(config, cfg.head_dim) if cfg.qk_norm and self.key else _identity
        self.rotate = _make_rotation(cfg) if cfg.position == "rope" else _identity

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: AttentionMask,
        key: Key | None = None,
        bias: Float[Array, "#B N T T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the attended x, `bias` added to the scores; with a `key`, dropout drops attention
        weights."""
        q, k, v = self.heads(x, mask.q_positions)
        mask = mask.within(self.window, self.patterns[mask.reach.causal])
        with jax.named_scope("attention"):
            if key is None or self.dropout == 0:
                attended = self.attend(q, k, v, mask, bias=bias)
            else:
                shape = (x.shape[0], self.num_heads, x.shape[1], x.shape[1])
                spec = self.rules("batch", "heads", "seq", None)
                kept = exchanged(draw_kept(key, self.dropout, shape, spec), mask.reach, axis=2)
                attended = self.attend_dropping(q, k, v, mask, kept, bias)
        return self.out(attended)

    def heads(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]):
        """Returns queries, keys and values, those that turn with position turned."""
        q = self.rotate(self.query_norm(self.query(x)), positions)
        if self.key is None:
            return q, unit_length(q), self.value(x)
        return q, self.rotate(self.key_norm(self.key(x)), positions), self.value(x)


def _identity(x, *_):
    return x


def _make_rotation(cfg: ModelConfig):
    sizes = cfg.rope_scaling, cfg.rope_factor, cfg.rope_original_len
    betas = cfg.rope_beta_fast, cfg.rope_beta_slow
    frequencies = rope_frequencies(cfg.head_dim, cfg.rope_theta, *sizes, betas)
    is_yarn = cfg.rope_scaling == "yarn"
    factor = cfg.rope_attention_factor or attention_factor(cfg.rope_factor) if is_yarn else 1.0
    return functools.partial(rotate, frequencies=tuple(frequencies), factor=factor)
