"""One layer: attention, then feed-forward, each normalised and added to the residual stream.

What a layer is made of is looked up in tables: `ATTENTION`, `MLP`, `NORMS`, `NORM_POSITIONS` (and
`POSITIONS`, of what is added to the embeddings). A new kind is a new file and a line in its table.
"""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxgpt.config import Config, ModelConfig
from jaxgpt.model.attention import Attention
from jaxgpt.model.experts import Experts
from jaxgpt.model.layers import NORMS, GatedMlp, Mlp, dropout
from jaxgpt.ops.activations import GATED
from jaxgpt.ops.mask import AttentionMask
from jaxgpt.parallel.dropout import Key, split
from jaxgpt.parallel.rules import AxisRules

ATTENTION = {"softmax": Attention}
MLP = {"plain": Mlp, "gated": GatedMlp, "experts": Experts}


def pre_norm(x, norm, layer):
    """Returns x + layer(norm(x)) (GPT-2, section 2.3) and the layer's second result."""
    added, rest = layer(norm(x))
    return x + added, rest


def post_norm(x, norm, layer):
    """Returns norm(x + layer(x)) (arXiv:1706.03762, section 3.1) and the layer's second result."""
    added, rest = layer(x)
    return norm(x + added), rest


NORM_POSITIONS = {"pre": pre_norm, "post": post_norm}


def _mlp_kind(cfg: ModelConfig) -> str:
    return "experts" if cfg.num_experts else "gated" if cfg.activation in GATED else "plain"


class Block(nnx.Module):
    """Attention and feed-forward of one layer, whose attention sees `window` keys (0: all)."""

    def __init__(
        self, config: Config, rules: AxisRules, kernel: str, window: int, *, rngs: nnx.Rngs
    ):
        cfg = config.model
        self.dropout, self.add = cfg.dropout, NORM_POSITIONS[cfg.norm_position]
        self.whole = rules("batch", "seq", None)
        self.attention_norm = NORMS[cfg.norm](config, cfg.embed_dim)
        self.attention = ATTENTION["softmax"](config, rules, kernel, window, rngs=rngs)
        self.mlp_norm = NORMS[cfg.norm](config, cfg.embed_dim)
        self.mlp = MLP[_mlp_kind(cfg)](config, rules, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: AttentionMask,
        key: Key | None = None,
        bias: Float[Array, "#B N T T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Returns the layer's output and its auxiliary losses by name; `key` is for dropout, `bias`
        is added to the scores."""
        keys = split(key, 3)

        def drop(y, key):
            return dropout(y, self.dropout, key, mask.reach)

        def attend(attention, x):
            x = jax.sharding.reshard(x, self.whole)
            return drop(attention(x, mask, keys[0], bias), keys[1]), None

        x, _, losses = self._run(x, attend, lambda y: drop(y, keys[2]))
        return x, losses

    def decoding(self, x: Float[Array, "B T D"], attend: Callable) -> tuple:
        """Returns the layer's output and the updated cache, both from `attend(attention, x)`."""
        return self._run(x, attend, lambda y: y)[:2]

    def _run(self, x, attend, drop):
        def feed_forward(x):
            y, losses = self.mlp(jax.sharding.reshard(x, self.whole))
            return drop(y), losses

        x, cache = self.add(x, self.attention_norm, functools.partial(attend, self.attention))
        x, losses = self.add(x, self.mlp_norm, feed_forward)
        return x, cache, losses
