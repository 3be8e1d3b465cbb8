"""The feed-forward nonlinearities by name."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),  # arXiv:1606.08415
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # its tanh form: GPT-2's
    "relu": jax.nn.relu,
    "leaky_relu": functools.partial(jax.nn.leaky_relu, negative_slope=0.01),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv:2109.08668
    "silu": jax.nn.silu,
}


def keep_inputs_only(f: Callable) -> Callable:
    """Returns f whose backward pass computes it again: elementwise, that costs less than keeping
    what lies between (gelu's: five arrays instead of one)."""
    return jax.checkpoint(f, prevent_cse=False)


GATED = {"swiglu": "silu", "geglu": "gelu_tanh"}  # arXiv:2002.05202: act(gate(x)) * up(x)
