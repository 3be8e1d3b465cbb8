"""`objective=distill`: a student learns from the data and from a teacher's view of it.

    alpha * T**2 * KL + (1 - alpha) * cross-entropy + hidden_weight * distance of hidden states

per target (arXiv:1503.02531, section 2). The rows' `loss` and `hard_loss` are the cross-entropy,
`soft_loss` is T**2 * KL, `hidden_loss` the distance.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxgpt.config import Config
from jaxgpt.config.schema import IGNORE, DistillConfig
from jaxgpt.distillation.divergence import Losses, Output, distillation_losses
from jaxgpt.distillation.layers import comparison
from jaxgpt.distillation.top_k import top_k_losses
from jaxgpt.model import GPT
from jaxgpt.objectives.auxiliary import with_auxiliary
from jaxgpt.objectives.language import hidden, hidden_and_figures


def distill(config: Config) -> Callable:
    """Returns the objective. Its companion is the `teacher`, unless the batch brings its likeliest
    tokens (`top_k`); with `hidden_weight` the `projection` is trained along."""
    cfg, z_loss = config.objectives.distill, config.optim.z_loss
    learn = _from_disk if cfg.top_k else _from_teacher

    def objective(model: GPT, micro: dict, key: PRNGKeyArray, **companions):
        compare = comparison(cfg.hidden_layers, model, companions.get("teacher"))
        x, figures = hidden_and_figures(model, micro, key)
        losses, distance = learn(cfg, model, x, micro, compare, **companions)
        nats, soft = jnp.sum(losses.nats), jnp.sum(losses.soft)
        total = cfg.alpha * soft + (1 - cfg.alpha) * nats
        total = total + z_loss * jnp.sum(jnp.square(losses.lse))
        metrics = {"loss": nats, "hard_loss": nats, "soft_loss": soft}
        for name, value in distance.items():
            total, metrics = total + cfg.hidden_weight * value, metrics | {name: value}
        count = jnp.sum(micro["targets"] != IGNORE)
        return with_auxiliary(total, count, metrics, figures)

    return objective


def output(model: GPT, x: Float[Array, "B T D"]) -> Output:
    """Returns what the logits of hidden states come from."""
    table, reader = model.vocabulary.parts()
    return Output(model.vocabulary.transformed(x), table, model.vocabulary.finish, reader)


def _from_teacher(
    cfg: DistillConfig,
    model: GPT,
    x: Float[Array, "B T D"],
    micro: dict,
    compare: Callable,
    teacher: GPT,
    projection: dict | None = None,
) -> tuple[Losses, dict]:
    with jax.named_scope("teacher"):
        theirs = jax.lax.stop_gradient(hidden(teacher, micro, None))
    outputs, targets = (output(model, x), output(teacher, theirs)), micro["targets"]
    with jax.named_scope("loss"):
        losses = distillation_losses(
            *outputs, targets, cfg.temperature, cfg.divergence, model.rules
        )
    if projection is None:
        return losses, {}
    distance = compare(x, theirs, projection["kernel"])
    return losses, {"hidden_loss": jnp.sum(jnp.where(targets != IGNORE, distance, 0))}


def _from_disk(
    cfg: DistillConfig, model: GPT, x: Float[Array, "B T D"], micro: dict, compare: Callable
) -> tuple[Losses, dict]:
    with jax.named_scope("loss"):
        return top_k_losses(output(model, x), micro, cfg, model.rules), {}
