"""Everything a training step changes, as a plain pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.model import ModelSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer state and the number of updates made."""

    params: dict
    opt_state: Any
    step: Any  # int32 scalar; a leaf may also be its shape, its sharding, ...


def init_state(spec: ModelSpec, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step; under `jax.eval_shape`, its shapes and shardings."""
    params = spec.init(jax.random.key(seed))
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
