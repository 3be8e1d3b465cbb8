"""The small parts of a block: parameters, layer norm, dropout, feed-forward."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from jaxgpt.config import ModelConfig
from jaxgpt.ops.norm import layer_norm
from jaxgpt.parallel.rules import AxisRules, weight

INIT_STD = 0.02  # GPT-2's, for every matrix and both embeddings
NORM_EPS = 1e-5


def normal(rngs: nnx.Rngs, shape: tuple, spec: P, dtype, std: float = INIT_STD) -> nnx.Param:
    """Returns a parameter drawn from N(0, std^2), sharded by `spec` from birth.

    The values depend on the key alone, not on the mesh.
    """
    init = jax.nn.initializers.normal(std)
    return nnx.Param(init(rngs.params(), shape, dtype, out_sharding=spec))


def constant(value: float, shape: tuple, spec: P, dtype) -> nnx.Param:
    """Returns a parameter filled with `value`, sharded by `spec` from birth."""
    return nnx.Param(jnp.full(shape, value, dtype, out_sharding=spec))


def residual_std(cfg: ModelConfig) -> float:
    """Std of the two projections that each block adds to the residual stream.

    GPT-2 scales them by 1/sqrt(N) with N = 2 * num_layers residual additions (section 2.3).
    """
    return INIT_STD / (2 * cfg.num_layers) ** 0.5


def dropout(x: Float[Array, "*S"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*S"]:
    """Returns x with a share `rate` zeroed and the rest scaled by 1/(1-rate); x where key is None."""
    if key is None or rate == 0:
        return x
    spec = jax.typeof(x).sharding.spec
    kept = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=spec)
    return jnp.where(kept, x / (1 - rate), 0)


class LayerNorm(nnx.Module):
    """Layer normalisation with learned scale and bias, in float32."""

    def __init__(self, cfg: ModelConfig):
        dtype = jnp.dtype(cfg.param_dtype)
        self.scale = constant(1.0, (cfg.embed_dim,), P(None), dtype)
        self.bias = constant(0.0, (cfg.embed_dim,), P(None), dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return layer_norm(x, self.scale[...], self.bias[...], NORM_EPS)


class Mlp(nnx.Module):
    """Feed-forward: `down(gelu(up(x)))`, gelu in its tanh form as GPT-2 has it."""

    def __init__(self, cfg: ModelConfig, rules: AxisRules, *, rngs: nnx.Rngs):
        dtype, d, f = jnp.dtype(cfg.param_dtype), cfg.embed_dim, cfg.hidden_dim
        self.rules = rules
        self.up = normal(rngs, (d, f), rules("embed", "mlp"), dtype)
        self.up_bias = constant(0.0, (f,), rules("mlp"), dtype)
        self.down = normal(rngs, (f, d), rules("mlp", "embed"), dtype, residual_std(cfg))
        self.down_bias = constant(0.0, (d,), P(None), dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = self.rules("batch", "seq", "mlp")
        up = jnp.einsum("BTD,DF->BTF", x, weight(self.up, x.dtype), out_sharding=hidden)
        act = jax.nn.gelu(up + weight(self.up_bias, x.dtype), approximate=True)
        down = jnp.einsum(
            "BTF,FD->BTD", act, weight(self.down, x.dtype),
            out_sharding=self.rules("batch", "seq", None),
        )  # fmt: skip
        return down + weight(self.down_bias, x.dtype)
