"""The small parts of a block: projections, norms, dropout, feed-forward."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxgpt.config import Config, ModelConfig
from jaxgpt.ops.activations import ACTIVATIONS, GATED, keep_inputs_only
from jaxgpt.ops.context.order import exchanged
from jaxgpt.ops.mask import Reach
from jaxgpt.ops.norm import layer_norm, rms_norm
from jaxgpt.parallel.dropout import Key, draw_kept
from jaxgpt.parallel.rules import AxisRules, weight
from jaxgpt.parameters import lora
from jaxgpt.parameters.weights import Shape, constant, kernel_storage

NATURAL = Reach(causal=False)  # whose positions are in natural order
INIT_STD = 0.02  # GPT-2's, for every matrix and both embeddings


def hidden_std(cfg: ModelConfig) -> float:
    """Std of a hidden matrix: GPT-2's; under muP it falls with sqrt(width) (arXiv:2203.03466)."""
    return INIT_STD / cfg.width_ratio**0.5


def residual_std(cfg: ModelConfig) -> float:
    """Std of the two projections that each block adds to the residual stream.

    GPT-2 scales them by 1/sqrt(N) with N = 2 * num_layers residual additions (section 2.3).
    """
    return hidden_std(cfg) / (2 * cfg.num_layers) ** 0.5


def dropout(
    x: Float[Array, "*S"], rate: float, key: Key | None, reach: Reach = NATURAL
) -> Float[Array, "*S"]:
    """Returns x with a share `rate` zeroed and the rest scaled by 1/(1-rate); x where key is
    None. In layers of a `reach` no order of positions changes which (see `context.order`)."""
    if key is None or rate == 0:
        return x
    kept = exchanged(draw_kept(key, rate, x.shape, jax.typeof(x).sharding.spec), reach)
    return jnp.where(kept, x / (1 - rate), 0)


class Linear(nnx.Module):
    """`einsum(equation, x, kernel) + bias` over rows M = B * T, with every axis named.

    SIZES maps the kernel's letters to the config's lengths and AXES to logical axes;
    activations keep embed (D, or E of the outputs) whole. `name` is what `lora.targets` calls it.
    """

    SIZES = {"D": "embed_dim", "E": "embed_dim", "F": "mlp_dim"}
    SIZES |= {"N": "num_heads", "K": "num_kv_heads", "H": "head_dim"}
    AXES = {"D": "embed", "E": None, "N": "heads", "K": "kv_heads", "H": "head_dim", "F": "mlp"}

    def __init__(
        self,
        name: str,
        equation: str,
        config: Config,
        rules: AxisRules,
        *,
        bias: bool,
        std: float,
        rngs: nnx.Rngs,
    ):
        inputs, out = equation.split("->")
        letters = inputs.split(",")[1]
        dtype = jnp.dtype(config.compute.param_dtype)
        size = {letter: getattr(config.model, name) for letter, name in self.SIZES.items()}
        shape, spec = [size[c] for c in letters], rules(*(self.AXES[c] for c in letters))
        self.equation, self.rules = equation, rules
        positions = "residual" if out == "MD" else "seq"
        self.out = rules("batch", positions, *(None if c == "D" else self.AXES[c] for c in out[1:]))
        ins = len(letters) - len(out[1:])
        self.storage = kernel_storage(config, name, Shape(tuple(shape), ins, spec))
        self.kernel = self.storage.make(rngs, std)
        bias_shape = [size[c] for c in out[1:]]
        self.bias = constant(0.0, bias_shape, P(*self.out[2:]), dtype) if bias else None
        if config.lora.rank and name in config.lora.targets.split(","):
            self.lora_scale = config.lora.alpha / config.lora.rank
            adapter = lora.make_adapter(shape, ins, spec, config.lora, dtype, rngs.params())
            for part, value in adapter.items():
                setattr(self, part, value)
        else:
            self.lora_scale = 0.0

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        y = self.storage.product(self.equation, x, self.kernel, self.out, self.rules)
        if self.lora_scale:
            adapter = {part: getattr(self, part, None) for part in lora.NAMES}
            where = x, self.equation, lambda: self.storage.dense(self.kernel, x.dtype)
            y = lora.add(y, *where, adapter, self.lora_scale, self.out)
        return y if self.bias is None else y + weight(self.bias, x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with a learned scale and, where the model has biases, a bias."""

    def __init__(self, config: Config, dim: int):
        dtype, self.eps = jnp.dtype(config.compute.param_dtype), config.model.norm_eps
        self.scale = constant(1.0, (dim,), P(None), dtype)
        self.bias = constant(0.0, (dim,), P(None), dtype) if config.model.bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        bias = None if self.bias is None else self.bias[...]
        return layer_norm(x, self.scale[...], bias, self.eps)


class RmsNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, config: Config, dim: int):
        self.eps = config.model.norm_eps
        self.scale = constant(1.0, (dim,), P(None), jnp.dtype(config.compute.param_dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.scale[...], self.eps)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RmsNorm}


class Mlp(nnx.Module):
    """Feed-forward: `down(act(up(x)))`. Like every feed-forward kind, it also returns its auxiliary
    losses by name: none."""

    def __init__(self, config: Config, rules: AxisRules, *, rngs: nnx.Rngs):
        cfg = config.model
        self.act = keep_inputs_only(ACTIVATIONS[cfg.activation])
        shared = dict(bias=cfg.bias, rngs=rngs)
        self.up = Linear("up", "MD,DF->MF", config, rules, std=hidden_std(cfg), **shared)
        self.down = Linear("down", "MF,FD->MD", config, rules, std=residual_std(cfg), **shared)

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], dict]:
        return self.down(self.act(self.up(x))), {}


class GatedMlp(nnx.Module):
    """Gated feed-forward: `down(act(gate(x)) * up(x))` (arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: Config, rules: AxisRules, *, rngs: nnx.Rngs):
        cfg = config.model
        act = ACTIVATIONS[GATED[cfg.activation]]
        self.act = keep_inputs_only(lambda gate, up: act(gate) * up)
        shared = dict(bias=cfg.bias, rngs=rngs)
        self.gate = Linear("gate", "MD,DF->MF", config, rules, std=hidden_std(cfg), **shared)
        self.up = Linear("up", "MD,DF->MF", config, rules, std=hidden_std(cfg), **shared)
        self.down = Linear("down", "MF,FD->MD", config, rules, std=residual_std(cfg), **shared)

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], dict]:
        return self.down(self.act(self.gate(x), self.up(x))), {}
