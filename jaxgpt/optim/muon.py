"""Muon for the hidden matrices, Adam's direction for the rest; both are optax's."""

import math

import jax
import optax
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxgpt.config import ModelConfig, OptimConfig
from jaxgpt.optim.groups import by_path, inputs_outputs, is_hidden_matrix

ADAM_RMS = 0.2  # of an AdamW update: Muon scaled to it shares AdamW's rate (arXiv:2502.16982, 2.2)


def dimension_numbers(params: dict) -> dict:
    """Returns which axes of each hidden matrix are inputs and which outputs; layers are a batch."""
    return by_path(lambda path: MuonDimensionNumbers(*inputs_outputs(path)), params)


def to_adam_size(updates: dict, params: dict) -> dict:
    """Returns orthogonal updates, whose RMS is 1/sqrt(max(in, out)), scaled to RMS ADAM_RMS."""

    def scale(update, numbers: MuonDimensionNumbers):
        inputs, outputs = (
            math.prod(update.shape[axis] for axis in axes)
            for axes in (numbers.reduction_axis, numbers.output_axis)
        )
        return update * ADAM_RMS * math.sqrt(max(inputs, outputs))

    return jax.tree.map(scale, updates, dimension_numbers(updates))


def on_whole_matrices(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `inner` fed with unsharded updates: orthogonalising needs a matrix in one place.

    The momentum stays whole as well.
    """

    def whole(tree):
        return jax.tree.map(lambda x: jax.sharding.reshard(x, P(*(None,) * x.ndim)), tree)

    def update(updates, state, params=None):
        new, state = inner.update(whole(updates), state, params and whole(params))
        back = jax.tree.map(
            lambda a, like: jax.sharding.reshard(a, jax.typeof(like).sharding.spec), new, updates
        )
        return back, state

    return optax.GradientTransformation(lambda params: inner.init(whole(params)), update)


def muon_direction(cfg: OptimConfig, model: ModelConfig) -> optax.GradientTransformation:
    """Returns Muon's direction (Jordan et al. 2024) for hidden matrices, Adam's elsewhere.

    Momentum `b1`, Nesterov, five Newton-Schulz steps, each matrix scaled to Adam's usual update
    size, so that learning rate and weight decay carry over from AdamW.
    """
    dtype = cfg.moment_dtype or None
    muon = optax.chain(
        scale_by_muon(beta=cfg.b1, mu_dtype=dtype, weight_dimension_numbers=dimension_numbers),
        optax.stateless(to_adam_size),
    )
    return optax.partition(
        {
            "muon": on_whole_matrices(muon),
            "adam": optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=dtype),
        },
        lambda params: by_path(lambda p: "muon" if is_hidden_matrix(p) else "adam", params),
    )
