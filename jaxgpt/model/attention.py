"""Multi-head causal self-attention with an optional KV cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxgpt.config import ModelConfig
from jaxgpt.model.cache import LayerCache, write
from jaxgpt.model.layers import constant, normal, residual_std
from jaxgpt.ops.attention import KERNELS, sharded
from jaxgpt.parallel.rules import AxisRules, weight


class Attention(nnx.Module):
    """Causal self-attention (arXiv:1706.03762, section 3.2), heads split over `tensor`.

    `kernel` names the implementation for whole sequences; a cache is always read by the XLA one,
    whose queries are too few for a flash kernel to pay.
    """

    def __init__(self, cfg: ModelConfig, rules: AxisRules, kernel: str, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.param_dtype)
        d, n, h = cfg.embed_dim, cfg.num_heads, cfg.head_dim
        self.rules, self.dropout = rules, cfg.dropout
        self.attend = sharded(KERNELS[kernel], rules, dropout=cfg.dropout)
        self.attend_cached = sharded(KERNELS["xla"], rules)
        into, bias = rules("embed", "heads", "head_dim"), rules("heads", "head_dim")
        self.query = normal(rngs, (d, n, h), into, dtype)
        self.query_bias = constant(0.0, (n, h), bias, dtype)
        self.key = normal(rngs, (d, n, h), into, dtype)
        self.key_bias = constant(0.0, (n, h), bias, dtype)
        self.value = normal(rngs, (d, n, h), into, dtype)
        self.value_bias = constant(0.0, (n, h), bias, dtype)
        out = rules("heads", "head_dim", "embed")
        self.out = normal(rngs, (n, h, d), out, dtype, residual_std(cfg))
        self.out_bias = constant(0.0, (d,), P(None), dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the attended x and the cache with x's keys and values written into it."""
        q = self._project(x, self.query, self.query_bias)
        k = self._project(x, self.key, self.key_bias)
        v = self._project(x, self.value, self.value_bias)
        if cache is None:
            attended = self.attend(q, k, v, positions, self._kept(x, key))
        else:
            cache = write(cache, k, v, positions, self.rules)
            attended = self.attend_cached(q, cache.k, cache.v, positions)
        out = jnp.einsum(
            "BTNH,NHD->BTD", attended, weight(self.out, x.dtype),
            out_sharding=self.rules("batch", "seq", None),
        )  # fmt: skip
        return out + weight(self.out_bias, x.dtype), cache

    def _project(self, x, kernel: nnx.Param, bias: nnx.Param) -> Float[Array, "B T N H"]:
        heads = self.rules("batch", "seq", "heads", "head_dim")
        y = jnp.einsum("BTD,DNH->BTNH", x, weight(kernel, x.dtype), out_sharding=heads)
        return y + weight(bias, x.dtype)

    def _kept(self, x, key):
        """Which attention weights dropout keeps, drawn here so that no mesh can change them."""
        if key is None or self.dropout == 0:
            return None
        (batch, length, _), heads = x.shape, self.query.shape[-2]
        spec = self.rules("batch", "heads", None, None)
        shape = (batch, heads, length, length)
        return jax.random.bernoulli(key, 1 - self.dropout, shape, out_sharding=spec)
