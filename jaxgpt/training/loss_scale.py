"""Dynamic loss scaling for float16, whose gradients would underflow (arXiv:1710.03740, 3.2)."""

import jax.numpy as jnp

FIRST = 2.0**15
GROW_EVERY = 2000  # finite steps in a row before the scale doubles


def initial(dtype: str) -> dict:
    """Returns the state {"scale", "good_steps"} for float16, {} for any other dtype."""
    if dtype != "float16":
        return {}
    return {"scale": jnp.float32(FIRST), "good_steps": jnp.int32(0)}


def factor(state: dict):
    """Returns what the loss is multiplied with and the gradient divided by."""
    return state["scale"] if state else 1.0


def adjust(state: dict, good) -> dict:
    """Returns the next state: half the scale after a non-finite step, double after many finite."""
    steps = jnp.where(good, state["good_steps"] + 1, 0)
    grown = jnp.where(steps == GROW_EVERY, 2.0, 1.0)
    scale = state["scale"] * jnp.where(good, grown, 0.5)
    return {"scale": scale, "good_steps": jnp.where(steps == GROW_EVERY, 0, steps)}
