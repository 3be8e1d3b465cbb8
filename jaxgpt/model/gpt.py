"""GPT-2 as a stack of identical blocks (Radford et al. 2019; Vaswani et al. 2017)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxgpt.config import ModelConfig
from jaxgpt.model.attention import Attention
from jaxgpt.model.cache import LayerCache
from jaxgpt.model.layers import LayerNorm, Mlp, dropout, normal
from jaxgpt.parallel.rules import AxisRules, weight

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
    """Pre-norm block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, cfg: ModelConfig, rules: AxisRules, kernel: str, *, rngs: nnx.Rngs):
        self.dropout = cfg.dropout
        self.attention_norm = LayerNorm(cfg)
        self.attention = Attention(cfg, rules, kernel, rngs=rngs)
        self.mlp_norm = LayerNorm(cfg)
        self.mlp = Mlp(cfg, rules, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        attended, cache = self.attention(self.attention_norm(x), positions, cache, keys[0])
        x = x + dropout(attended, self.dropout, keys[1])
        x = x + dropout(self.mlp(self.mlp_norm(x)), self.dropout, keys[2])
        return x, cache


class GPT(nnx.Module):
    """Decoder-only transformer. `blocks` is one Block whose parameters have a leading axis L.

    Parameters stay stacked whether the blocks run in a scan or unrolled, so that a checkpoint
    fits either.
    """

    def __init__(self, cfg: ModelConfig, rules: AxisRules, kernel: str, *, rngs: nnx.Rngs):
        param_dtype = jnp.dtype(cfg.param_dtype)
        self.rules, self.dtype = rules, jnp.dtype(cfg.dtype)
        self.vocab_size, self.num_layers = cfg.vocab_size, cfg.num_layers
        self.dropout, self.remat = cfg.dropout, cfg.remat
        self.unroll = 1 if cfg.scan_layers else cfg.num_layers
        vocab = rules("vocab", "embed")
        self.tokens = normal(rngs, (cfg.padded_vocab_size, cfg.embed_dim), vocab, param_dtype)
        seq = rules("seq", "embed")
        self.positions = normal(rngs, (cfg.max_seq_len, cfg.embed_dim), seq, param_dtype)
        self.blocks = _stack(cfg, rules, kernel, rngs.params())
        self.final_norm = LayerNorm(cfg)

    def __call__(
        self, tokens: Int[Array, "B T"], *, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits; ids from `vocab_size` on are padding and get -inf.

        Without a `dropout_key` nothing is dropped.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        positions = jax.sharding.reshard(positions, self.rules("batch", "seq"))
        x, _ = self._run(tokens, positions, None, dropout_key)
        return self._logits(x)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: LayerCache,
        at: Int[Array, "B"],
    ) -> tuple[Float[Array, "B V"], LayerCache]:
        """Returns the logits after token `at[b]` of each row, and the cache grown by the tokens.

        The tokens stand at `positions`, consecutive in each row; what is before is in the cache.
        """
        x, cache = self._run(tokens, positions, cache, None)
        x = jnp.take_along_axis(x, at[:, None, None], axis=1)
        return self._logits(x)[:, 0], cache

    def _run(self, tokens, positions, cache, key):
        layers_key, embed_key = (None, None) if key is None else jax.random.split(key)
        x = dropout(self._embed(tokens, positions), self.dropout, embed_key)
        graphdef, stacked = nnx.split(self.blocks)

        def apply(x, layer):
            params, layer_cache, layer_key = layer
            return nnx.merge(graphdef, params)(x, positions, layer_cache, layer_key)

        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT[self.remat], prevent_cse=self.unroll > 1)
        keys = None if key is None else jax.random.split(layers_key, self.num_layers)
        return jax.lax.scan(apply, x, (stacked, cache, keys), unroll=self.unroll)

    def _embed(self, tokens, positions) -> Float[Array, "B T D"]:
        spec = self.rules("batch", "seq", None)
        words = weight(self.tokens, self.dtype).at[tokens].get(out_sharding=spec)
        places = weight(self.positions, self.dtype).at[positions].get(out_sharding=spec)
        return words + places

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        x = self.final_norm(x)
        logits = jnp.einsum(
            "BTD,VD->BTV", x, weight(self.tokens, x.dtype), preferred_element_type=jnp.float32,
            out_sharding=self.rules("batch", "seq", "vocab"),
        )  # fmt: skip
        ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)
        return jnp.where(ids < self.vocab_size, logits, -jnp.inf)


def _stack(cfg: ModelConfig, rules: AxisRules, kernel: str, key: PRNGKeyArray) -> Block:
    """Returns one Block with every parameter stacked over layers, each layer from its own key."""

    def make(key) -> Block:
        return Block(cfg, rules, kernel, rngs=nnx.Rngs(params=key))

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0))))
    stacked = jax.vmap(lambda key: nnx.state(make(key)))(jax.random.split(key, cfg.num_layers))
    return nnx.merge(graphdef, stacked)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """How to build a GPT: `init` draws parameters, `bind` puts given ones into a module.

    Parameters travel as a nested dict of arrays (a plain pytree, no Flax types).
    """

    cfg: ModelConfig
    kernel: str
    rules: AxisRules = AxisRules()

    def init(self, key: PRNGKeyArray) -> dict:
        """Returns fresh parameters; under `jax.eval_shape`, their shapes and shardings."""
        model = GPT(self.cfg, self.rules, self.kernel, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(model))

    def bind(self, params: dict) -> GPT:
        """Returns the module that computes with `params`."""
        model = nnx.eval_shape(
            lambda: GPT(self.cfg, self.rules, self.kernel, rngs=nnx.Rngs(params=0))
        )
        graphdef, state = nnx.split(model)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    def for_decoding(self) -> "ModelSpec":
        """Returns the same model with activations whole over the batch axis."""
        return dataclasses.replace(self, rules=AxisRules(split_batch=False))


def count_parameters(params: dict, cfg: ModelConfig) -> int:
    """Returns the number of parameters without the vocabulary's padding rows."""
    padding = cfg.padded_vocab_size - cfg.vocab_size
    return sum(leaf.size for leaf in jax.tree.leaves(params)) - padding * cfg.embed_dim
