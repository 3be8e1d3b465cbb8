"""Muon for the hidden matrices, Adam's direction for the rest; optax's `scale_by_muon`, but its
momentum is split as the parameters are, and each device orthogonalises its share of the matrices.
"""

import functools
import math
from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from jaxgpt.config import ModelConfig, OptimConfig
from jaxgpt.optim.groups import by_path, inputs_outputs, is_hidden_matrix
from jaxgpt.parallel.specs import names
from jaxgpt.parallel.torus import Torus
from jaxgpt.parallel.whole import Split, on_whole

ADAM_RMS = 0.2  # of an AdamW update: Muon scaled to it shares AdamW's rate (arXiv:2502.16982, 2.2)
STEPS = 5  # of Newton and Schulz
AT_ONCE = 2**24  # elements of the matrices that a device orthogonalises at the same time


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


class Matrices(NamedTuple):
    """How a stacked kernel [L, inputs..., outputs...] is matrices [n, R, C] with R <= C."""

    rows: tuple[int, tuple[str, ...]]  # how many, and the mesh axes that split them
    columns: tuple[int, tuple[str, ...]]
    split: tuple[str, ...]  # the mesh axes that split the axes in front: layers, experts
    turned: bool  # rows are outputs
    spec: P  # of the kernel

    @classmethod
    def of(cls, kernel: jax.Array, numbers: MuonDimensionNumbers) -> "Matrices":
        """Returns how `kernel` is: of several axes of inputs, or outputs, the first is split."""
        both = numbers.reduction_axis, numbers.output_axis
        firsts = [axes[0] for axes in both]
        given = jax.typeof(kernel).sharding.spec
        spec = [
            entry if axis < firsts[0] or axis in firsts else None
            for axis, entry in enumerate(given)
        ]
        sides = [
            (math.prod(kernel.shape[axis] for axis in axes), names(spec[axes[0]])) for axes in both
        ]
        split = tuple(name for entry in spec[: firsts[0]] for name in names(entry))
        return cls(*sorted(sides), split, sides != sorted(sides), P(*spec))

    def take(self, kernel: jax.Array, numbers: MuonDimensionNumbers) -> Float[Array, "n R C"]:
        """Returns this device's part of the kernel as parts of matrices."""
        inputs, outputs = (
            math.prod(kernel.shape[axis] for axis in axes)
            for axes in (numbers.reduction_axis, numbers.output_axis)
        )
        x = kernel.reshape(-1, inputs, outputs)
        return x.swapaxes(1, 2) if self.turned else x

    def put(self, x: Float[Array, "n R C"], kernel: jax.Array) -> jax.Array:
        """Returns parts of matrices in the kernel's shape."""
        return (x.swapaxes(1, 2) if self.turned else x).reshape(kernel.shape)


def newton_schulz(x: Float[Array, "R C"], coefficients: Float[Array, "3"]) -> Float[Array, "R C"]:
    """Returns x with singular values near 1 (Jordan et al. 2024); zeros for zeros."""
    a, b, c = coefficients.astype(x.dtype)
    x /= jnp.linalg.norm(x) + 1e-8
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def orthogonal(kernels: dict, coefficients: Float[Array, "3"], torus: Torus) -> dict:
    """Returns the kernels' matrices orthogonalised, split as they are given. Matrices of the same
    shape, turned or not, and split alike are dealt out together."""
    leaves, tree = jax.tree.flatten(kernels)
    numbers = jax.tree.leaves(
        dimension_numbers(kernels), is_leaf=lambda x: isinstance(x, MuonDimensionNumbers)
    )
    alike = defaultdict(list)
    for i, (kernel, number) in enumerate(zip(leaves, numbers, strict=True)):
        form = Matrices.of(kernel, number)
        alike[form[:3]].append((i, form))
    for members in alike.values():
        places, forms = zip(*members, strict=True)
        given = [jax.sharding.reshard(leaves[i], form.spec) for i, form in members]
        new = _dealt(given, forms, [numbers[i] for i in places], coefficients, torus)
        for i, a in zip(places, new, strict=True):
            leaves[i] = jax.sharding.reshard(a, jax.typeof(leaves[i]).sharding.spec)
    return jax.tree.unflatten(tree, leaves)


def _dealt(kernels: list, forms: tuple[Matrices, ...], numbers: list, coefficients, torus: Torus):
    """`orthogonal` of kernels with matrices alike."""
    (rows, by_rows), (columns, by_columns), in_front = forms[0][:3]

    def local(coefficients, *kernels):
        def each(x: Float[Array, "n R C"]) -> Float[Array, "n R C"]:
            one = functools.partial(newton_schulz, coefficients=coefficients)
            at_once = max(1, AT_ONCE // (rows * columns))
            return jax.lax.map(one, x, batch_size=min(at_once, len(x)))

        parts = [form.take(*rest) for form, *rest in zip(forms, kernels, numbers, strict=True)]
        split = Split(in_front, by_rows, by_columns)
        x = on_whole(each, jnp.concatenate(parts), split, torus)
        parts = jnp.split(x, np.cumsum([len(part) for part in parts])[:-1])
        return [form.put(*rest) for form, *rest in zip(forms, parts, kernels, strict=True)]

    specs = [form.spec for form in forms]
    run = jax.shard_map(local, in_specs=(P(), *specs), out_specs=specs, check_vma=False)
    return run(coefficients, *kernels)


def scale_by_dealt_muon(
    beta: float, dtype: str | None, torus: Torus
) -> optax.GradientTransformation:
    """Returns `optax.contrib.scale_by_muon`, whose state it has, on matrices that are dealt out."""

    def update(updates, state: MuonState, params=None):
        count = state.count + 1
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        nesterov = jax.tree.map(
            lambda m, g: beta * m + (1 - beta) * g,
            optax.tree.bias_correction(mu, beta, count + 1),
            optax.tree.bias_correction(updates, beta, count),
        )
        new = orthogonal(nesterov, state.ns_coeffs, torus)
        return new, MuonState(count, optax.tree.cast(mu, dtype), state.ns_coeffs)

    return optax.GradientTransformation(scale_by_muon(beta=beta, mu_dtype=dtype).init, update)


def muon_direction(
    cfg: OptimConfig, model: ModelConfig, torus: Torus
) -> optax.GradientTransformation:
    """Returns Muon's direction (Jordan et al. 2024) for hidden matrices, Adam's elsewhere.

    Momentum `b1`, Nesterov, five Newton-Schulz steps, each matrix scaled to Adam's usual update
    size, so that learning rate and weight decay carry over from AdamW.
    """
    dtype = cfg.moment_dtype or None
    return optax.partition(
        {
            "muon": optax.chain(
                scale_by_dealt_muon(cfg.b1, dtype, torus), optax.stateless(to_adam_size)
            ),
            "adam": optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=dtype),
        },
        lambda params: by_path(lambda p: "muon" if is_hidden_matrix(p) else "adam", params),
    )
