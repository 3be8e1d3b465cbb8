"""Everything a training step changes, as a plain pytree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config import Config
from jaxgpt.model import ModelSpec
from jaxgpt.optim.groups import OWN, split, trainable
from jaxgpt.training import divergence, loss_scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer state, the number of updates made, and what some recipes add.

    `ema` is the running average of the parameters in float32, {} where `optim.ema_decay` is 0;
    `loss_scale` is {} but for float16.
    """

    params: Any  # these are Any because a leaf may also be its shape, its sharding, ...
    opt_state: Any
    step: Any  # int32 scalar
    ema: Any = dataclasses.field(default_factory=dict)
    loss_scale: Any = dataclasses.field(default_factory=dict)
    bad: Any = dataclasses.field(default_factory=dict)  # see `training.divergence`

    @property
    def best_params(self) -> dict:
        """The parameters to evaluate and sample with: the average, where there is one."""
        return self.ema or self.params


def init_state(
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    config: Config,
    own: Callable[[], dict] = dict,
    params: Any = None,
) -> TrainState:
    """Returns the state before the first step; under `jax.eval_shape`, its shapes and shardings.

    `params` are those to start from, default fresh ones; `own` makes those of the objective's own.
    The optimizer's state holds the trained ones only.
    """
    params = spec.init(jax.random.key(config.seed)) if params is None else params
    params = params | ({OWN: made} if (made := own()) else {})
    ema = jax.tree.map(to_float32, params) if config.optim.ema_decay else {}
    trained, _ = split(params, trainable(params, config.optim.freeze, spec.config.lora.rank))
    return TrainState(
        params,
        optimizer.init(trained),
        jnp.zeros((), jnp.int32),
        ema=ema,
        loss_scale=loss_scale.initial(config.compute.dtype),
        bad=divergence.counters(),
    )


def to_float32(p: jax.Array) -> jax.Array:
    """Returns a parameter in float32, as it is stored: within a program XLA may leave out the
    rounding to bfloat16."""
    kept = jnp.finfo(p.dtype)
    return jax.lax.reduce_precision(p.astype(jnp.float32), kept.nexp, kept.nmant)
