"""Learning rate as a function of the number of updates already made."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from jaxgpt.config import OptimConfig

# Share of the way from final to peak learning rate, at `progress` in [0, 1] past the warm-up.
SHAPES: dict[str, Callable] = {
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),  # arXiv:1608.03983, eq. 5
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: jnp.ones_like(progress),
}


def make_schedule(cfg: OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns `count -> learning rate`; count 0 is the first update.

    Step k = count + 1 gets learning_rate * k / warmup_steps while k <= warmup_steps, and the last
    step exactly learning_rate * final_lr_ratio ("constant" stays at learning_rate).
    """
    shape, decay_steps = SHAPES[cfg.schedule], max(num_steps - cfg.warmup_steps, 1)

    def schedule(count):
        step = jnp.asarray(count, jnp.float32) + 1
        warm = step / max(cfg.warmup_steps, 1)
        progress = jnp.clip((step - cfg.warmup_steps) / decay_steps, 0, 1)
        decayed = cfg.final_lr_ratio + (1 - cfg.final_lr_ratio) * shape(progress)
        return cfg.learning_rate * jnp.where(step <= cfg.warmup_steps, warm, decayed)

    return schedule
