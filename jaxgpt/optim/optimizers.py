"""optax chains by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config import ModelConfig, OptimConfig, ShrinkConfig
from jaxgpt.optim.experts import with_router_biases
from jaxgpt.optim.groups import as_matrices, by_path, decay_mask, lr_factors
from jaxgpt.optim.muon import muon_direction
from jaxgpt.optim.schedules import make_schedule
from jaxgpt.optim.sparsity import sparsity
from jaxgpt.parallel.torus import Torus


def adamw(cfg: OptimConfig, model: ModelConfig, torus: Torus) -> optax.GradientTransformation:
    """Adam's direction (arXiv:1711.05101, algorithm 2), `eps` outside the root as torch has it."""
    return optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=cfg.moment_dtype or None)


def lion(cfg: OptimConfig, model: ModelConfig, torus: Torus) -> optax.GradientTransformation:
    """The sign of a momentum (arXiv:2302.06675); wants a third to a tenth of AdamW's rate."""
    return optax.scale_by_lion(b1=cfg.b1, b2=cfg.b2, mu_dtype=cfg.moment_dtype or None)


def adafactor(cfg: OptimConfig, model: ModelConfig, torus: Torus) -> optax.GradientTransformation:
    """Factored second moments (arXiv:1804.04235, algorithm 4) with update clipping at 1, for each
    layer's own matrices."""
    alone = optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30), optax.clip_by_block_rms(1.0)
    )
    axes = (optax.FactoredState(count=None, v_row=0, v_col=0, v=0), None)

    # Each stack has its own number of layers
    stacks = {"blocks/": "stacked"}
    if model.num_experts:
        of_dense = {f"blocks/mlp/{name}/": "dense" for name in ("gate", "up", "down")}
        of_mixture = {"blocks/mlp/experts/": "experts", "blocks/mlp/": "mixtures"}
        stacks = of_dense | of_mixture | stacks
    if model.kind == "encoder_decoder":
        stacks = {f"{stack}/blocks/": stack for stack in ("encoder", "decoder")}

    def kind(path: str) -> str:
        return next((name for start, name in stacks.items() if path.startswith(start)), "alone")

    parts = {name: per_layer(alone, axes) for name in stacks.values()} | {"alone": alone}
    if model.num_experts:
        parts["experts"] = per_layer(alone, axes, stacked=2)
    return optax.partition(parts, lambda params: by_path(kind, params))


def per_layer(
    inner: optax.GradientTransformation, axes, stacked: int = 1
) -> optax.GradientTransformation:
    """Returns `inner` run on the matrices of each layer apart (see `as_matrices`); `axes` says
    where its state gets the axis of layers, as `jax.vmap` has it."""

    def each(f, **axes):
        for _ in range(stacked):
            f = jax.vmap(f, **axes)
        return f

    def init(params):
        if not jax.tree.leaves(params):  # all frozen, or no such layer
            return inner.init(params)
        return each(inner.init, out_axes=axes)(as_matrices(params, stacked))

    def update(updates, state, params):
        if not jax.tree.leaves(updates):
            return updates, state
        run = each(inner.update, in_axes=(0, axes, 0), out_axes=(0, axes))
        new, state = run(as_matrices(updates, stacked), state, as_matrices(params, stacked))
        return jax.tree.map(lambda a, like: a.reshape(like.shape), new, updates), state

    return optax.GradientTransformation(init, update)


def sgd(cfg: OptimConfig, model: ModelConfig, torus: Torus) -> optax.GradientTransformation:
    """Momentum `b1`, no dampening, as torch has it."""
    dtype = cfg.moment_dtype or None
    return optax.trace(decay=cfg.b1, nesterov=False, accumulator_dtype=dtype)


DIRECTIONS: dict[str, Callable[[OptimConfig, ModelConfig, Torus], optax.GradientTransformation]] = {
    "adamw": adamw,
    "lion": lion,
    "adafactor": adafactor,
    "sgd": sgd,
    "muon": muon_direction,
}


def make_optimizer(
    cfg: OptimConfig,
    num_steps: int,
    model: ModelConfig,
    shrink: ShrinkConfig | None = None,
    torus: Torus = (),
) -> optax.GradientTransformation:
    """Returns: clip by global norm; the direction of `optim.name`; decoupled weight decay on
    matrices; learning-rate factors by path; the schedule; what keeps zeros.
    `torus` is the mesh's (see `parallel.torus`). Raises `BadInput` on the first use, if a
    pattern of `optim.lr_multipliers` matches nothing."""
    parts = [
        clip_by_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        DIRECTIONS[cfg.name](cfg, model, torus),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
    ]
    if cfg.lr_multipliers or model.mup_base_width:
        parts.append(_by_factor(cfg.lr_multipliers, model))
    parts.append(optax.scale_by_learning_rate(make_schedule(cfg, num_steps)))
    update = optax.chain(*parts, *sparsity(shrink or ShrinkConfig(), num_steps))
    if model.num_experts and model.router == "sigmoid_topk":
        return with_router_biases(update, model.router_bias_rate)
    return update


def clip_by_norm(most: float) -> optax.GradientTransformation:
    """Returns gradients times min(1, most / their norm over all of them) (arXiv:1211.5063, section
    3.2): one factor, where `optax.clip_by_global_norm` divides them into arrays of their own."""

    def clip(grads, params):
        factor = most / jnp.maximum(optax.global_norm(grads), most)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)

    return optax.stateless(clip)


def at_step(opt_state: optax.OptState, step) -> optax.OptState:
    """Returns the optimizer's state with its schedule at `step` updates, skipped ones included.

    A skipped step leaves the state as it is: right for the moments and their own counts, but a
    schedule that waited would not reach its end at `num_steps`.
    """

    def is_schedule(node) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def set_count(node):
        return node._replace(count=step) if is_schedule(node) else node

    return jax.tree.map(set_count, opt_state, is_leaf=is_schedule)


def _by_factor(multipliers: str, model: ModelConfig) -> optax.GradientTransformation:
    def scale(updates, params):
        factors = lr_factors(updates, multipliers, model)
        return jax.tree.map(lambda u, factor: u * factor, updates, factors)

    return optax.stateless(scale)
