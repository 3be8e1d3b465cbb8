"""One stack of like blocks: GPT-2, Llama, BERT, by its config."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxgpt.config import Config
from jaxgpt.model.block import Block
from jaxgpt.model.layers import INIT_STD, NORMS, dropout
from jaxgpt.model.pipeline.stages import pipelined, stages_of
from jaxgpt.model.positions import POSITIONS
from jaxgpt.model.relative import bias_of, relative_bias
from jaxgpt.model.stacked.blocks import Blocks, Part, added
from jaxgpt.model.vocabulary import Vocabulary
from jaxgpt.ops.context.order import exchanged
from jaxgpt.ops.mask import AttentionMask, Reach
from jaxgpt.ops.remat import RESIDUAL_STREAM, scan_layers
from jaxgpt.parallel.dropout import split
from jaxgpt.parallel.rules import AxisRules, weight
from jaxgpt.parameters.weights import normal


class Stack(nnx.Module):
    """Layers, the embeddings beside the tokens' own, and the last norm.

    `blocks` has the parameters of all layers, stacked, and runs in scans or unrolled, so that a
    checkpoint fits either.
    """

    def __init__(
        self,
        config: Config,
        rules: AxisRules,
        kernel: str,
        *,
        causal: bool,
        block: type = Block,
        rngs: nnx.Rngs,
    ):
        cfg, compute = config.model, config.compute
        self.rules, self.dropout, self.remat = rules, cfg.dropout, compute.remat
        self.reach, self.num_layers = Reach(causal), cfg.num_layers
        self.positions = POSITIONS[cfg.position](config, rules, rngs=rngs)
        self.unroll = compute.scan_layers == "false"
        self.stages, inside = stages_of(config, rules)
        split = jax.P("pipeline" if self.stages else None)
        self.blocks = Blocks(config, inside, kernel, block, rngs.params(), split)
        norm, pre = NORMS[cfg.norm], cfg.norm_position == "pre"
        self.final_norm = norm(config, cfg.embed_dim) if pre else lambda x: x
        self.embedding_norm = norm(config, cfg.embed_dim) if cfg.embedding_norm else lambda x: x
        self.relative = relative_bias(config, rules, causal=causal, rngs=rngs)
        table, param_dtype = (cfg.type_vocab_size, cfg.embed_dim), jnp.dtype(compute.param_dtype)
        drawn = table, rules(None, "embed"), param_dtype, INIT_STD
        self.types = normal(rngs, *drawn) if cfg.type_vocab_size else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: AttentionMask,
        key: PRNGKeyArray | None,
        bias: Float[Array, "#B N T T"] | None,
        *context,
        types: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Returns the last layer's normalised output from the tokens' embeddings, and the layers'
        auxiliary losses by name, each summed over the layers. `bias` is added to the scores of
        attention; blocks are given `context` too."""
        layers_key, embed_key = split(key, 2)
        x = dropout(self.embed(x, mask.q_positions, types), self.dropout, embed_key)
        x, mask = exchanged((x, mask), self.reach)
        bias = exchanged(bias, self.reach, axis=2)
        x, losses = self.run(x, mask, layers_key, bias, *context)
        x = exchanged(x, self.reach, back=True)
        return jax.sharding.reshard(self.final_norm(x), self.rules("batch", "seq", None)), losses

    def embed(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns what the first layer is given of tokens' embeddings; `types` default to 0."""
        positions = jax.sharding.reshard(positions, self.rules("batch", "residual"))
        x = self.positions(x, positions)
        if self.types is not None:
            types = jnp.zeros_like(positions) if types is None else types
            types = jax.sharding.reshard(types, self.rules("batch", "residual"))
            x += weight(self.types, x.dtype).at[types].get(out_sharding=jax.typeof(x).sharding.spec)
        return self.embedding_norm(x)

    def run(self, x: Float[Array, "B T D"], mask: AttentionMask, *arguments) -> tuple:
        """Returns the last layer's output and the auxiliary losses; `arguments`: of `__call__`."""
        key, *rest = arguments
        keys = None if key is None else jax.random.split(key, self.num_layers)
        params, losses = nnx.state(self.blocks), []
        if self.stages:
            part = Part(0, self.stages.layers, self.blocks.parts[0].period)
            layers = functools.partial(self.run_part, part, rest)
            return pipelined(layers, self.stages, params, x, mask, keys)
        for part in self.blocks.parts:
            x, of_part = self.run_part(part, rest, params, x, mask, keys)
            losses.append(of_part)
        return x, added(losses)

    def run_part(
        self, part: Part, rest, params, x, mask: AttentionMask, keys, key_of: Callable = lambda k: k
    ) -> tuple:
        """Returns the same of one part, in a scan; its layers are given `key_of(key)`."""

        def apply(x, turn, given):
            mask, rest = given
            x, losses, (arrays, keys) = checkpoint_name(x, RESIDUAL_STREAM), [], turn
            for i, block in enumerate(self.blocks.blocks_of(part, arrays)):
                x, of_layer = block(x, mask, None if keys is None else key_of(keys[i]), *rest)
                losses.append(of_layer)
            return x, added(losses)

        if keys is not None:
            keys = keys[part.start : part.stop].reshape(part.turns, part.period)
        turns, unroll = (self.blocks.turns(part, params), keys), part.turns if self.unroll else 1
        # A stage of one turn is computed again as a whole
        remat = "none" if self.stages and part.turns == 1 else self.remat
        x, losses = scan_layers(apply, x, turns, (mask, rest), remat=remat, unroll=unroll)
        return x, jax.tree.map(lambda a: jnp.sum(a, axis=0), losses)


class GPT(nnx.Module):
    """A vocabulary and one stack of layers, whose tokens see those before them, or all (BERT)."""

    def __init__(self, config: Config, rules: AxisRules, kernel: str, *, rngs: nnx.Rngs):
        self.rules = rules
        self.vocabulary = Vocabulary(config, rules, rngs=rngs)
        causal = config.model.kind == "decoder"
        self.stack = Stack(config, rules, kernel, causal=causal, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"], **arguments) -> Float[Array, "B T V"]:
        """Returns float32 logits, -inf for the vocabulary's padding; `arguments`: of `hidden`."""
        x, _ = self.hidden(tokens, **arguments)
        return self.vocabulary.logits(x, self.vocabulary.table())

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        types: Int[Array, "B T"] | None = None,
        prefix: Int[Array, "B"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Returns the last layer's normalised output, which `losses` reads, and the layers'
        auxiliary losses by name, each summed over the layers.

        Tokens see those of their own segment only: number packed documents, or give padding a
        number of its own. In front of `prefix` they see each other. Nothing drops without a key.
        """
        mask = make_mask(tokens.shape, positions, segments, prefix, self.stack.reach, self.rules)
        bias = bias_of(self.stack.relative, mask, positions is None)
        return self.stack(self.vocabulary.embed(tokens), mask, dropout_key, bias, types=types)


def make_mask(
    shape: tuple[int, int],
    positions: Int[Array, "B T"] | None,
    segments: Int[Array, "B T"] | None,
    prefix: Int[Array, "B"] | None,
    reach: Reach,
    rules: AxisRules,
) -> AttentionMask:
    """Returns the mask of tokens [B, T]; `positions` default to 0..T-1."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    mask = AttentionMask(positions, positions, segments, segments, prefix, reach)
    specs = jax.tree.map(lambda a: rules("batch", "seq") if a.ndim > 1 else rules("batch"), mask)
    return jax.sharding.reshard(mask, specs)
