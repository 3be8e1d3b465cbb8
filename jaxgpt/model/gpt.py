"""A decoder as a stack of like blocks: GPT-2, Llama, the 2017 Transformer's, by its config."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxgpt.config import Config, ModelConfig
from jaxgpt.model.block import Block
from jaxgpt.model.layers import INIT_STD, NORMS, dropout
from jaxgpt.model.positions import POSITIONS
from jaxgpt.ops.cross_entropy import cross_entropy
from jaxgpt.ops.mask import AttentionMask
from jaxgpt.ops.remat import REMAT, RESIDUAL_STREAM
from jaxgpt.parallel.fsdp import embed_columns_to_rows
from jaxgpt.parallel.rules import AxisRules, rowwise
from jaxgpt.parameters.weights import table_storage

UNROLLED_LAYERS = 12  # on a CPU


class GPT(nnx.Module):
    """Decoder-only transformer. `blocks` is one Block whose parameters have a leading axis L.

    Parameters stay stacked whether the blocks run in a scan or unrolled, so that a checkpoint
    fits either. Layers differ at most in their window, by a pattern that repeats.
    """

    def __init__(self, config: Config, rules: AxisRules, kernel: str, *, rngs: nnx.Rngs):
        cfg, compute = config.model, config.compute
        self.rules, self.dtype = rules, jnp.dtype(compute.dtype)
        self.vocab_size, self.num_layers = cfg.vocab_size, cfg.num_layers
        self.dropout, self.remat = cfg.dropout, compute.remat
        self.softcap, self.logit_scale = cfg.logit_softcap, 1 / cfg.width_ratio
        self.embed_scale = math.sqrt(cfg.embed_dim) if cfg.scale_embeddings else 1.0
        shape, axis = (cfg.padded_vocab_size, cfg.embed_dim), -1 if rules.split_batch else -2
        self.storage = table_storage(config, "head", shape, axis)
        drawn = rngs, rules("vocab", "embed"), INIT_STD
        self.tokens = self.storage.make(*drawn)
        self.head = None if cfg.tie_embeddings else self.storage.make(*drawn)
        self.positions = POSITIONS[cfg.position](config, rules, rngs=rngs)
        self.layer_windows = layer_windows(cfg)
        groups = cfg.num_layers // len(self.layer_windows)
        self.unroll = groups if compute.scan_layers == "false" else 1
        self.blocks, self.graphdefs = _stack(
            config, rules, kernel, self.layer_windows, rngs.params()
        )
        pre = cfg.norm_position == "pre"
        self.final_norm = NORMS[cfg.norm](config, cfg.embed_dim) if pre else lambda x: x

    def __call__(self, tokens: Int[Array, "B T"], **arguments) -> Float[Array, "B T V"]:
        """Returns float32 logits; ids from `vocab_size` on are padding and get -inf. `arguments`
        are those of `hidden`."""
        x, _ = self.hidden(tokens, **arguments)
        return self.logits(x, self.table())

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Returns the last layer's normalised output, which `logits` reads, and the layers'
        auxiliary losses by name, each summed over the layers.

        `positions` default to 0..T-1. Tokens see those of their own segment only: number packed
        documents, or give padding a number of its own. Without a `dropout_key` nothing drops.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = AttentionMask(positions, positions, segments, segments)
        mask = jax.sharding.reshard(mask, self.rules("batch", "seq"))
        x, losses = self._run(tokens, mask, dropout_key)
        x = jax.sharding.reshard(self.final_norm(x), self.rules("batch", "seq", None))
        return x, losses

    def table(self):
        """Returns the output embedding as it is stored, whole over `fsdp`: gathered once, however
        often `storage.rows` reads it."""
        return self.storage.whole(self.tokens if self.head is None else self.head, self.dtype)

    def logits(self, x: Float[Array, "B T D"], table) -> Float[Array, "B T V"]:
        """Returns the float32 logits of hidden states; -inf for the padding of the vocabulary."""
        rows, out = self.storage.rows(table, x.dtype), self.rules("batch", "seq", "vocab")
        logits = rowwise("MD,VD->MV", x, rows, out, jnp.float32)
        return self.finish(logits, jnp.arange(logits.shape[-1]))

    def losses(
        self, x: Float[Array, "B T D"], targets: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Returns (nats, logsumexp) of each target from hidden states, without whole logits; see
        `ops.cross_entropy`."""
        table, reader = self.storage.parts(self.tokens if self.head is None else self.head)
        with jax.named_scope("loss"):
            return cross_entropy(x, table, targets, self.finish, self.rules, reader)

    def finish(self, logits: Float[Array, "*B V"], ids: Int[Array, "V"]) -> Float[Array, "*B V"]:
        logits = self.logit_scale * logits
        if self.softcap:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return jnp.where(ids < self.vocab_size, logits, -jnp.inf)

    def _run(self, tokens, mask: AttentionMask, key):
        layers_key, embed_key = (None, None) if key is None else jax.random.split(key)
        x = dropout(self.embed(tokens, mask.q_positions), self.dropout, embed_key)
        period = len(self.layer_windows)

        def apply(x, group):
            """One turn of the pattern: `period` layers, each with its own window."""
            x, losses = checkpoint_name(x, RESIDUAL_STREAM), []
            for i, graphdef in enumerate(self.graphdefs):
                params, layer_key = jax.tree.map(lambda a, i=i: a[i], group)
                x, layer_losses = nnx.merge(graphdef, params)(x, mask, layer_key)
                losses.append(layer_losses)
            return x, jax.tree.map(lambda *a: jnp.stack(a), *losses)

        if self.remat != "none" or jax.sharding.get_abstract_mesh().shape["fsdp"] > 1:
            apply = jax.checkpoint(apply, policy=REMAT[self.remat], prevent_cse=self.unroll > 1)
        keys = None if key is None else jax.random.split(layers_key, self.num_layers)
        layers = (nnx.state(self.blocks), keys)
        groups = jax.tree.map(lambda a: a.reshape(-1, period, *a.shape[1:]), layers)
        x, losses = jax.lax.scan(apply, x, groups, unroll=self.unroll)
        return x, jax.tree.map(jnp.sum, losses)

    def embed(self, tokens, positions) -> Float[Array, "B T D"]:
        """Every device looks up its own columns for the rows of all that share its other axes, and
        they trade: fewer bytes than gathering the table, and its gradient stays split."""
        tokens = jax.sharding.reshard(tokens, self.rules("lookup_batch", "seq"))
        out = self.rules("lookup_batch", "seq", "embed")
        x = self.storage.lookup(self.tokens, tokens, self.dtype, out)
        positions = jax.sharding.reshard(positions, self.rules("batch", "residual"))
        return self.positions(embed_columns_to_rows(x, self.rules) * self.embed_scale, positions)


def resolve_scan(config: Config, platform: str) -> Config:
    """Returns `config` with `compute.scan_layers=auto` decided for `platform` (`cpu`, ...).

    Layers of their own are faster on a CPU, but each takes its time to compile: beyond
    `UNROLLED_LAYERS` a scan, whose compile time does not grow with depth. Elsewhere a scan.
    """
    compute, layers = config.compute, config.model.num_layers
    if compute.scan_layers != "auto":
        return config
    scan = "false" if platform == "cpu" and layers <= UNROLLED_LAYERS else "true"
    return dataclasses.replace(config, compute=dataclasses.replace(compute, scan_layers=scan))


def layer_windows(cfg: ModelConfig) -> tuple[int, ...]:
    """Returns the windows of the repeating pattern of layers: (4, 4, 0) = two local, one full."""
    if not cfg.window or not cfg.full_attention_every:
        return (cfg.window,)
    return (cfg.window,) * (cfg.full_attention_every - 1) + (0,)


def _stack(config: Config, rules: AxisRules, kernel: str, windows: tuple, key: PRNGKeyArray):
    """Returns a Block with every parameter stacked over layers, each layer from its own key, and
    the graph of a block for each window of the pattern."""

    def make(key, window: int) -> Block:
        return Block(config, rules, kernel, window, rngs=nnx.Rngs(params=key))

    def graph(window: int):
        return nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0), window)))

    keys = jax.random.split(key, config.model.num_layers)
    stacked = jax.vmap(lambda key: nnx.state(make(key, windows[0])))(keys)
    graphs = tuple(map(graph, windows))
    return nnx.merge(graphs[0], stacked), graphs
