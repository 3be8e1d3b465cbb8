"""What training minimises. An objective is a function of the model and one microbatch:

    (model, micro, key, **companions) -> (sum, count, metrics)

The step minimises the sum over all microbatches divided by the sum of the counts, and logs each
metric, also a sum, divided in the same way; `loss` is one. `companions` is what it asks for:
models that are not trained, and what is trained for it alone. `training.objectives` lists them all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jaxgpt.config import Config
from jaxgpt.config.schema import IGNORE
from jaxgpt.model import Model, ModelSpec
from jaxgpt.objectives.auxiliary import with_auxiliary
from jaxgpt.objectives.smoothing import even_losses

Batch = dict[str, Shaped[Array, "A B ..."]]  # inputs, targets [A, B, T], PLACES and others
Micro = dict[str, Shaped[Array, "B ..."]]  # one of a batch's A microbatches
# What a model takes besides the inputs, where a batch has it
PLACES = ("positions", "segments", "types", "prefix", "sources", "source_segments")


def hidden(model: Model, micro: Micro, key: PRNGKeyArray | None) -> Float[Array, "B T D"]:
    """Returns the hidden states of a microbatch; nothing drops without a key."""
    return hidden_and_figures(model, micro, key)[0]


def hidden_and_figures(model: Model, micro: Micro, key: PRNGKeyArray | None) -> tuple:
    """Returns the same, and what an objective gives `objectives.auxiliary.with_auxiliary`."""
    places = {name: micro[name] for name in PLACES if name in micro}
    return model.hidden(micro["inputs"], dropout_key=key, **places)


def token_losses(
    model: Model, micro: Micro, dropout_key: PRNGKeyArray | None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns the cross-entropy in nats of each target, and the logsumexp of its logits; both are 0
    where the target is `IGNORE`. The logits are never in memory as a whole."""
    return model.vocabulary.losses(hidden(model, micro, dropout_key), micro["targets"])


def causal_lm(config: Config) -> Callable:
    """Returns the objective of next-token prediction: cross-entropy, and `optim.z_loss` times the
    squared logsumexp of the logits (PaLM, arXiv:2204.02311, section 5); a share
    `optim.label_smoothing` of it with even targets, which the row's `loss` leaves out."""
    z_loss, smoothing = config.optim.z_loss, config.optim.label_smoothing

    def objective(model: Model, micro: Micro, key: PRNGKeyArray | None):
        x, figures = hidden_and_figures(model, micro, key)
        nats, lse = model.vocabulary.losses(x, micro["targets"])
        loss, is_target = jnp.sum(nats), micro["targets"] != IGNORE
        total = loss + z_loss * jnp.sum(jnp.square(lse))
        if smoothing:
            even = even_losses(model.vocabulary, x, lse, micro["targets"])
            total += smoothing * (jnp.sum(even) - loss)
        return with_auxiliary(total, jnp.sum(is_target), {"loss": loss}, figures)

    return objective


def make_eval_step(spec: ModelSpec) -> Callable[[dict, Batch], Float[Array, "B T"]]:
    """Returns the jitted `(params, batch) -> nats of every target`, 0 where there is none."""

    def eval_step(params, batch: Batch):
        micro = jax.tree.map(lambda a: a[0], batch)
        nats, _ = token_losses(spec.bind(params), micro, None)
        return jax.sharding.reshard(nats, jax.P(None, None))

    return jax.jit(eval_step)
