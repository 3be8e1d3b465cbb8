"""Token embeddings, and what makes logits and losses of hidden states."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.config import Config
from jaxgpt.model.layers import INIT_STD, NORMS, Linear
from jaxgpt.ops.activations import ACTIVATIONS
from jaxgpt.ops.cross_entropy import cross_entropy
from jaxgpt.parallel.lookup import embed_columns_to_rows
from jaxgpt.parallel.rules import AxisRules, rowwise
from jaxgpt.parameters.bfloat16 import product_dtype
from jaxgpt.parameters.weights import constant, table_storage


class Vocabulary(nnx.Module):
    """The token embeddings and the output embedding, which may be one table."""

    def __init__(self, config: Config, rules: AxisRules, *, rngs: nnx.Rngs):
        cfg = config.model
        self.rules, self.dtype, self.size = rules, jnp.dtype(config.compute.dtype), cfg.vocab_size
        self.head_dtype = product_dtype(config.compute)
        self.embed_scale = math.sqrt(cfg.embed_dim) if cfg.scale_embeddings else 1.0
        self.scale = (cfg.embed_dim**-0.5 if cfg.scale_logits else 1.0) / cfg.width_ratio
        self.softcap = cfg.logit_softcap
        shape, axis = (cfg.padded_vocab_size, cfg.embed_dim), -1 if rules.split_batch else -2
        self.storage = table_storage(config, "head", shape, axis)
        drawn = rngs, rules("vocab", "embed"), INIT_STD
        self.tokens = self.storage.make(*drawn)
        self.head = None if cfg.tie_embeddings else self.storage.make(*drawn)
        if cfg.head_transform:
            self.transform = Linear(
                "transform", "MD,DE->ME", config, rules, bias=cfg.bias, std=INIT_STD, rngs=rngs
            )
            self.transform_norm = NORMS[cfg.norm](config, cfg.embed_dim)
        self.act = ACTIVATIONS[cfg.activation] if cfg.head_transform else None
        bias = (cfg.padded_vocab_size,), rules("vocab"), jnp.dtype(config.compute.param_dtype)
        self.head_bias = constant(0.0, *bias) if cfg.head_bias else None

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the tokens' embeddings. Every device looks up its own columns for the rows of all
        that share its other axes, and they trade: fewer bytes than gathering the table, and its
        gradient stays split."""
        tokens = jax.sharding.reshard(tokens, self.rules("lookup_batch", "lookup_seq"))
        out = self.rules("lookup_batch", "lookup_seq", "embed")
        x = self.storage.lookup(self.tokens, tokens, self.dtype, out)
        return embed_columns_to_rows(x, self.rules) * self.embed_scale

    def table(self):
        """Returns the output embedding as it is stored, but unsharded: gathered once, however
        often `storage.rows` reads it."""
        return self.storage.whole(self.tokens if self.head is None else self.head, self.dtype)

    def logits(self, x: Float[Array, "B T D"], table) -> Float[Array, "B T V"]:
        """Returns the float32 logits of hidden states; -inf for the padding of the vocabulary."""
        x = self.transformed(x)
        rows, out = self.storage.rows(table, x.dtype), self.rules("batch", "seq", "vocab")
        return self.finished(rowwise("MD,VD->MV", x, rows, out, jnp.float32))

    def transformed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what is multiplied with the table: hidden states, or BERT's transform of them."""
        if self.act is not None:
            x = self.transform_norm(self.act(self.transform(x)))
        return x.astype(self.head_dtype)

    def finished(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """Returns the logits of the products of hidden states and all rows."""
        if self.head_bias is not None:
            logits += self.head_bias[...]
        return self.finish(logits, jnp.arange(logits.shape[-1]))

    def losses(
        self, x: Float[Array, "B T D"], targets: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Returns (nats, logsumexp) of each target from hidden states, without whole logits; see
        `ops.cross_entropy`."""
        x = self.transformed(x)
        table, reader = self.parts()
        bias = None if self.head_bias is None else self.head_bias[...]
        with jax.named_scope("loss"):
            return cross_entropy(x, table, targets, self.finish, self.rules, reader, bias)

    def parts(self):
        """Returns the output embedding as `ops.cross_entropy` reads it, and how."""
        return self.storage.parts(self.tokens if self.head is None else self.head)

    def finish(self, logits: Float[Array, "*B V"], ids: Int[Array, "V"]) -> Float[Array, "*B V"]:
        """Returns the logits of the products of hidden states and the rows `ids`."""
        logits = self.scale * logits
        if self.softcap:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return jnp.where(ids < self.size, logits, -jnp.inf)
