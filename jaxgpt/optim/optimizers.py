"""optax chains by name, and which parameters decay."""

import jax
import optax

from jaxgpt.config import OptimConfig
from jaxgpt.optim.schedules import make_schedule

NOT_DECAYED = ("bias", "scale")  # the last word of a parameter's name


def decay_mask(params: dict) -> dict:
    """Returns True for the matrices (embeddings included), False for biases and norm scales.

    By name, not by rank: stacking over layers and splitting into heads add axes to a bias.
    """

    def decays(path, _) -> bool:
        return str(path[-1].key).split("_")[-1] not in NOT_DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(cfg: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns clipping by global norm, AdamW's direction, decoupled decay, the schedule.

    AdamW is arXiv:1711.05101, algorithm 2, with torch's `eps` outside the root.
    """
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(make_schedule(cfg, num_steps)),
    )
