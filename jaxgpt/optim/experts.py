"""Balance without a loss: a router's biases follow the sign of their gradient."""

import jax
import jax.numpy as jnp
import optax

from jaxgpt.optim.groups import by_path


def with_router_biases(
    rest: optax.GradientTransformation, rate: float
) -> optax.GradientTransformation:
    """Returns `rest` for all parameters but the biases of routers, which go `rate` against the sign
    of theirs at each update, whatever the schedule says (arXiv:2408.15664, algorithm 1)."""
    biases = optax.stateless(lambda updates, _: _signs(updates, rate))

    def kind(path: str) -> str:
        return "bias" if path.endswith("/router/bias") else "rest"

    return optax.partition({"bias": biases, "rest": rest}, lambda params: by_path(kind, params))


def _signs(updates, rate: float):
    return jax.tree.map(lambda u: -rate * jnp.sign(u), updates)
