"""optax chains by name."""

from collections.abc import Callable

import jax
import optax

from jaxgpt.config import ModelConfig, OptimConfig
from jaxgpt.optim.groups import decay_mask, lr_factors
from jaxgpt.optim.muon import muon_direction
from jaxgpt.optim.schedules import make_schedule


def adamw(cfg: OptimConfig) -> optax.GradientTransformation:
    """Adam's direction (arXiv:1711.05101, algorithm 2), `eps` outside the root as torch has it."""
    return optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=cfg.moment_dtype or None)


def lion(cfg: OptimConfig) -> optax.GradientTransformation:
    """The sign of a momentum (arXiv:2302.06675); wants a third to a tenth of AdamW's rate."""
    return optax.scale_by_lion(b1=cfg.b1, b2=cfg.b2, mu_dtype=cfg.moment_dtype or None)


def adafactor(cfg: OptimConfig) -> optax.GradientTransformation:
    """Factored second moments (arXiv:1804.04235, algorithm 4) with update clipping at 1."""
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30), optax.clip_by_block_rms(1.0)
    )


def sgd(cfg: OptimConfig) -> optax.GradientTransformation:
    """Momentum `b1`, no dampening, as torch has it."""
    dtype = cfg.moment_dtype or None
    return optax.trace(decay=cfg.b1, nesterov=False, accumulator_dtype=dtype)


DIRECTIONS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {
    "adamw": adamw,
    "lion": lion,
    "adafactor": adafactor,
    "sgd": sgd,
    "muon": muon_direction,
}


def make_optimizer(
    cfg: OptimConfig, num_steps: int, model: ModelConfig
) -> optax.GradientTransformation:
    """Returns: clip by global norm; the direction of `optim.name`; decoupled weight decay on
    matrices; learning-rate factors by path; the schedule.

    Raises:
      BadInput: on the first use, if a pattern of `optim.lr_multipliers` matches nothing.
    """
    parts = [
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        DIRECTIONS[cfg.name](cfg),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
    ]
    if cfg.lr_multipliers or model.mup_base_width:
        parts.append(_by_factor(cfg.lr_multipliers, model))
    return optax.chain(*parts, optax.scale_by_learning_rate(make_schedule(cfg, num_steps)))


def _by_factor(multipliers: str, model: ModelConfig) -> optax.GradientTransformation:
    def scale(updates, params):
        factors = lr_factors(updates, multipliers, model)
        return jax.tree.map(lambda u, factor: u * factor, updates, factors)

    return optax.stateless(scale)
