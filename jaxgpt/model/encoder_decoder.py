"""An encoder of one text and a decoder of another that attends to it: the 2017 Transformer, T5,
BART, by its config (arXiv:1706.03762, section 3.1)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxgpt.config import Config
from jaxgpt.model.block import ATTENTION, MLP, NORM_POSITIONS
from jaxgpt.model.cross_attention import CrossAttention, memory_mask
from jaxgpt.model.gpt import Stack, make_mask
from jaxgpt.model.layers import NORMS, dropout
from jaxgpt.model.relative import bias_of
from jaxgpt.model.vocabulary import Vocabulary
from jaxgpt.ops.activations import GATED
from jaxgpt.ops.mask import AttentionMask
from jaxgpt.parallel.dropout import split
from jaxgpt.parallel.rules import AxisRules


class DecoderBlock(nnx.Module):
    """A layer of the decoder: self-attention, attention to the encoder's output, feed-forward."""

    def __init__(
        self, config: Config, rules: AxisRules, kernel: str, window: int, *, rngs: nnx.Rngs
    ):
        cfg = config.model
        self.dropout, self.add = cfg.dropout, NORM_POSITIONS[cfg.norm_position]
        self.whole = rules("batch", "seq", None)
        norm = NORMS[cfg.norm]
        self.attention_norm = norm(config, cfg.embed_dim)
        self.attention = ATTENTION["softmax"](config, rules, kernel, window, rngs=rngs)
        self.cross_norm = norm(config, cfg.embed_dim)
        self.cross_attention = CrossAttention(config, rules, kernel, rngs=rngs)
        self.mlp_norm = norm(config, cfg.embed_dim)
        self.mlp = MLP["gated" if cfg.activation in GATED else "plain"](config, rules, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: AttentionMask,
        key: PRNGKeyArray | None,
        bias: Float[Array, "#B N T T"] | None,
        memory: Float[Array, "B S D"],
        memory_mask: AttentionMask,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Returns the layer's output and its auxiliary losses by name."""
        keys = split(key, 5)
        if mask.q_segments is not None:  # in the layers' order
            memory_mask = memory_mask._replace(q_segments=mask.q_segments)

        def drop(y, key):
            return dropout(y, self.dropout, key, mask.reach)

        def attend(attention, x):
            return drop(attention(x, mask, keys[0], bias), keys[1]), None

        def cross(attention, x):
            return drop(attention(x, memory, memory_mask, keys[2]), keys[3])

        x, _, losses = self._run(x, attend, cross, lambda y: drop(y, keys[4]))
        return x, losses

    def decoding(self, x: Float[Array, "B T D"], attend: Callable, cross: Callable) -> tuple:
        """Returns the layer's output and the updated cache, the latter from `attend(attention,
        x)`; `cross(cross_attention, x)` attends to the encoder's output."""
        return self._run(x, attend, cross, lambda y: y)[:2]

    def _run(self, x, attend, cross, drop):
        def part(f):
            return lambda x: f(jax.sharding.reshard(x, self.whole))

        def feed_forward(x):
            y, losses = self.mlp(x)
            return drop(y), losses

        x, cache = self.add(x, self.attention_norm, part(lambda x: attend(self.attention, x)))
        x, _ = self.add(x, self.cross_norm, part(lambda x: (cross(self.cross_attention, x), None)))
        x, losses = self.add(x, self.mlp_norm, part(feed_forward))
        return x, cache, losses


class EncoderDecoder(nnx.Module):
    """Two stacks over one vocabulary."""

    def __init__(self, config: Config, rules: AxisRules, kernel: str, *, rngs: nnx.Rngs):
        self.rules = rules
        self.vocabulary = Vocabulary(config, rules, rngs=rngs)
        self.encoder = Stack(encoder_config(config), rules, kernel, causal=False, rngs=rngs)
        self.decoder = Stack(config, rules, kernel, causal=True, block=DecoderBlock, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"], **arguments) -> Float[Array, "B T V"]:
        """Returns float32 logits; ids from `vocab_size` on are padding and get -inf. `arguments`
        are those of `hidden`."""
        x, _ = self.hidden(tokens, **arguments)
        return self.vocabulary.logits(x, self.vocabulary.table())

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        sources: Int[Array, "B S"],
        source_segments: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        prefix: Int[Array, "B"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Returns the decoder's normalised output, which `losses` reads, and the layers' auxiliary
        losses by name, each summed over both stacks.

        Tokens see those before them, in their own segment, and the sources of the segment of the
        same number. Segment 0 is padding; without `segments` all tokens are of segment 1, as the
        sources are without `source_segments`.
        """
        keys = split(dropout_key, 2)
        memory, encoder_losses = self.encode(sources, source_segments, keys[0])
        if source_segments is None:
            source_segments = jnp.ones(sources.shape, jnp.int32)
        seen = memory_mask(tokens.shape[1], source_segments, segments, self.rules)
        mask = make_mask(tokens.shape, positions, segments, prefix, self.decoder.reach, self.rules)
        bias = bias_of(self.decoder.relative, mask, positions is None)
        embedded = self.vocabulary.embed(tokens)
        x, losses = self.decoder(embedded, mask, keys[1], bias, memory, seen)
        return x, {name: loss + encoder_losses[name] for name, loss in losses.items()}

    def encode(
        self,
        sources: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B S D"], dict[str, Float[Array, ""]]]:
        """Returns the encoder's normalised output, the memory, and its auxiliary losses. Positions
        count from the start of each segment."""
        positions = None
        if segments is not None:
            positions = positions_in(jax.sharding.reshard(segments, self.rules("batch", None)))
        shape, reach = sources.shape, self.encoder.reach
        mask = make_mask(shape, positions, segments, None, reach, self.rules)
        bias = bias_of(self.encoder.relative, mask, positions is None)
        return self.encoder(self.vocabulary.embed(sources), mask, dropout_key, bias)

    @property
    def stack(self) -> Stack:
        """The stack that decoding runs (see `model.decoding`)."""
        return self.decoder


def encoder_config(config: Config) -> Config:
    """Returns a config whose sizes are the encoder's."""
    model = config.model
    sizes = dict(num_layers=model.encoder_layers, max_seq_len=model.max_source_len)
    return dataclasses.replace(config, model=dataclasses.replace(model, **sizes))


def positions_in(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Returns each token's place within its segment: of [1 1 2 2 2 0] it is [0 1 0 1 2 0]."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return index - jax.lax.cummax(jnp.where(segments != before, index, 0), axis=1)
