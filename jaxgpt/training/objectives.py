"""What training minimises. An objective is a function of the model and one microbatch:

    (model, micro, key, **companions) -> (sum, count, metrics)

The step minimises the sum over all microbatches divided by the sum of the counts, and logs each
metric, also a sum, divided in the same way; `loss` is one. `companions` is what it asks for:
models that are not trained, and what is trained for it alone. `OBJECTIVES` lists them all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jaxgpt.config import Config
from jaxgpt.config.schema import IGNORE
from jaxgpt.distillation.objective import distill
from jaxgpt.model import GPT, ModelSpec

Batch = dict[str, Shaped[Array, "A B T ..."]]  # inputs, targets (packed: segments, positions too)
Micro = dict[str, Shaped[Array, "B T ..."]]  # one of a batch's A microbatches


def token_losses(
    model: GPT, micro: Micro, dropout_key: PRNGKeyArray | None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns the cross-entropy in nats of each target, and the logsumexp of its logits; both are 0
    where the target is `IGNORE`. The logits are never in memory as a whole."""
    x, _ = model.hidden(
        micro["inputs"],
        positions=micro.get("positions"),
        segments=micro.get("segments"),
        dropout_key=dropout_key,
    )
    return model.losses(x, micro["targets"])


def causal_lm(config: Config) -> Callable:
    """Returns the objective of next-token prediction: cross-entropy, and `optim.z_loss` times the
    squared logsumexp of the logits (PaLM, arXiv:2204.02311, section 5)."""
    z_loss = config.optim.z_loss

    def objective(model: GPT, micro: Micro, key: PRNGKeyArray):
        nats, lse = token_losses(model, micro, key)
        loss = jnp.sum(nats)
        count = jnp.sum(micro["targets"] != IGNORE)
        return loss + z_loss * jnp.sum(jnp.square(lse)), count, {"loss": loss}

    return objective


OBJECTIVES: dict[str, Callable[[Config], Callable]] = {"causal_lm": causal_lm, "distill": distill}


def make_eval_step(spec: ModelSpec) -> Callable[[dict, Batch], Float[Array, "B T"]]:
    """Returns the jitted `(params, batch) -> nats of every target`, 0 where there is none."""

    def eval_step(params, batch: Batch):
        micro = jax.tree.map(lambda a: a[0], batch)
        nats, _ = token_losses(spec.bind(params), micro, None)
        return jax.sharding.reshard(nats, jax.P(None, None))

    return jax.jit(eval_step)
