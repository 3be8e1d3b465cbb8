"""The feed-forward of a mixture: a router, experts, and experts that every token shares."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxgpt.config import Config
from jaxgpt.model.experts.dispatch import mix, mix_over_devices, mix_where_they_are
from jaxgpt.model.experts.feed_forward import FeedForward
from jaxgpt.model.experts.router import choose, measure
from jaxgpt.model.layers import GatedMlp, Mlp, hidden_std, residual_std
from jaxgpt.ops.activations import ACTIVATIONS, GATED, keep_inputs_only
from jaxgpt.parallel.collectives import gather
from jaxgpt.parallel.fsdp import GATHERED
from jaxgpt.parallel.replicas import apart
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parallel.specs import names
from jaxgpt.parameters.weights import constant, normal

IN, OUT = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")


class Kernel(nnx.Module):
    """A matrix, or one of each expert, and the router's bias."""

    def __init__(self, kernel: nnx.Param, bias: nnx.Param | None = None):
        self.kernel, self.bias = kernel, bias


class Kernels(nnx.Module):
    """The matrices of all experts, [E, inputs, outputs] each, without biases."""

    def __init__(self, config: Config, rules: AxisRules, gated: bool, *, rngs: nnx.Rngs):
        cfg, dtype = config.model, jnp.dtype(config.compute.param_dtype)
        sizes = {"experts": cfg.num_experts, "embed": cfg.embed_dim, "mlp": cfg.expert_dim}

        def make(axes, std: float) -> Kernel:
            shape = [sizes[axis] for axis in axes]
            return Kernel(normal(rngs, shape, rules(*axes), dtype, std))

        self.gate = make(IN, hidden_std(cfg)) if gated else None
        self.up = make(IN, hidden_std(cfg))
        self.down = make(OUT, residual_std(cfg))

    def arrays(self) -> dict[str, jax.Array]:
        """Returns the matrices by name."""
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: part.kernel[...] for name, part in named.items() if part is not None}


class Experts(nnx.Module):
    """Returns `sum_i gate_i(x) expert_i(x)` over a token's experts, plus the shared ones' output,
    and the auxiliary losses and figures by name (see `router.measure`).

    Experts are of the kind that the model's activation asks for. Each device routes its own tokens;
    over the mesh axis `expert`, which splits the batch and the experts, they travel to theirs.
    """

    def __init__(self, config: Config, rules: AxisRules, *, rngs: nnx.Rngs):
        cfg = config.model
        self.choose = functools.partial(choose, cfg=cfg)
        self.measure = functools.partial(measure, cfg=cfg)
        self.rules, gated = rules, cfg.activation in GATED
        self.buffer = config.compute.expert_buffer
        kind = ACTIVATIONS[GATED.get(cfg.activation, cfg.activation)]
        act = keep_inputs_only((lambda gate, up: kind(gate) * up) if gated else kind)
        over = names(rules(*IN)[1])
        self.feed_forward = FeedForward(act, config.compute.remat == "none", over, rules.torus)
        dtype = jnp.dtype(config.compute.param_dtype)
        shape, spec = (cfg.embed_dim, cfg.num_experts), rules("embed", None)
        drawn = normal(rngs, shape, spec, dtype, hidden_std(cfg))
        # In float32, as small steps add up in it
        biased = cfg.router == "sigmoid_topk"
        bias = constant(0.0, (cfg.num_experts,), P(None), jnp.float32) if biased else None
        self.router = Kernel(drawn, bias)
        self.experts = Kernels(config, rules, gated, rngs=rngs)
        self.shared = _shared(config, rules, gated, rngs) if cfg.shared_experts else None

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], dict]:
        rows, sums = self.rules("batch", "seq", None), P(self.rules.rows)
        router, weights = self.router.kernel[...], jax.tree.map(apart, self.experts.arrays())
        bias = None if self.router.bias is None else self.router.bias[...]
        specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (router, bias, weights))
        run = jax.shard_map(
            self._local, in_specs=(rows, *specs), out_specs=(rows, sums), check_vma=False
        )
        y, summed = run(x, router, bias, weights)
        y = jax.sharding.reshard(y, self.rules("batch", "residual", None))
        summed = jax.tree.map(lambda a: jnp.sum(a, axis=0), summed)
        if self.shared is not None:
            y = y + self.shared(x)[0]
        return y, self.measure(summed, x.shape[0] * x.shape[1], bias)

    def _local(self, x, router, bias, weights):
        """The same of one device's rows [B, T, D], and its sums with an axis in front."""
        over = names(self.rules("embed")[0])
        weights = jax.tree.map(lambda a: a.reshape(a.shape[-3:]), weights)  # see `apart`
        whole = gather(router.astype(jnp.float32), 0, self.rules.torus, over)
        logits = jnp.einsum("BTD,DE->BTE", x.astype(jnp.float32), checkpoint_name(whole, GATHERED))
        (ids, gates), sums = self.choose(logits, bias)
        k = ids.shape[-1]
        flat = x.reshape(-1, x.shape[-1]), ids.reshape(-1, k), gates.reshape(-1, k)
        if not self.rules.split_batch:
            y = mix_where_they_are(*flat, weights, self.feed_forward)
        elif jax.lax.axis_size("expert") > 1:
            y = mix_over_devices(*flat, weights, self.feed_forward, self.buffer)
        else:
            y = mix(*flat, weights, self.feed_forward)
        y = jax.lax.psum(y, "tensor").reshape(x.shape)
        return y, jax.tree.map(lambda a: a[None], sums)


def _shared(config: Config, rules: AxisRules, gated: bool, rngs: nnx.Rngs) -> Mlp | GatedMlp:
    """Returns the shared experts as one that is as wide as all of them."""
    width = config.model.shared_experts * config.model.expert_dim
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mlp_dim=width))
    return (GatedMlp if gated else Mlp)(config, rules, rngs=rngs)
