"""Learning rate as a function of the number of steps already made, skipped ones included."""

import jax.numpy as jnp
import optax

from jaxgpt.config import OptimConfig


def cosine(progress, cfg: OptimConfig):
    """Half a cosine (arXiv:1608.03983, eq. 5)."""
    return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def linear(progress, cfg: OptimConfig):
    """A straight line."""
    return 1 - progress


def wsd(progress, cfg: OptimConfig):
    """Warm-up, stable, decay (arXiv:2404.06395): flat, then a line over `decay_fraction`."""
    return jnp.minimum(1, (1 - progress) / cfg.decay_fraction)


# Share of the way from final to peak learning rate, at `progress` in [0, 1] past the warm-up.
SHAPES = {"cosine": cosine, "linear": linear, "wsd": wsd}


def warmup_steps(cfg: OptimConfig, num_steps: int) -> int:
    """Returns how many of a run's steps warm up: `warmup_steps`, or `warmup_fraction` of them."""
    return round(cfg.warmup_fraction * num_steps) if cfg.warmup_fraction else cfg.warmup_steps


def make_schedule(cfg: OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns `count -> learning rate`; count 0 is the first update.

    Step k = count + 1 gets learning_rate * k / warmup while k <= warmup (see `warmup_steps`). After
    that `cosine`, `linear` and `wsd` reach learning_rate * final_lr_ratio at the last step,
    `constant` stays, and `rsqrt` is learning_rate * sqrt(warmup / k) (arXiv:1706.03762, eq. 3).
    """
    warmup = warmup_steps(cfg, num_steps)
    decay_steps = max(num_steps - warmup, 1)

    def after_warmup(step):
        if cfg.schedule == "constant":
            return 1.0
        if cfg.schedule == "rsqrt":
            return jnp.sqrt(max(warmup, 1) / step)
        progress = jnp.clip((step - warmup) / decay_steps, 0, 1)
        shape = SHAPES[cfg.schedule](progress, cfg)
        return cfg.final_lr_ratio + (1 - cfg.final_lr_ratio) * shape

    def schedule(count):
        step = jnp.asarray(count, jnp.float32) + 1
        warm = step / max(warmup, 1)
        return cfg.learning_rate * jnp.where(step <= warmup, warm, after_warmup(step))

    return schedule
