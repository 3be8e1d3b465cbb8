"""Projections as products of two smaller matrices, by truncated singular value decomposition, and
embeddings as tensor trains."""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.linalg import solve_triangular

from jaxgpt.config import Config
from jaxgpt.config.validate import LORA_TARGETS
from jaxgpt.optim.groups import INPUTS_OUTPUTS
from jaxgpt.parameters import tensor_train
from jaxgpt.shrinking.calibration import input_moments
from jaxgpt.shrinking.quantise import as_matrix, projections, with_kernels
from jaxgpt.shrinking.source import Source, with_shrink
from jaxgpt.shrinking.spec import Options
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput

RIDGE = 1e-6  # of the mean square of the inputs, added to each: their moments get an inverse


class Svd(NamedTuple):
    """A matrix as U diag(s) V, s falling, float64: the first R are the best matrix of rank R."""

    u: Float[np.ndarray, "I S"]
    s: Float[np.ndarray, "S"]
    v: Float[np.ndarray, "S O"]

    def factors(self, rank: int) -> tuple[Float[np.ndarray, "I R"], Float[np.ndarray, "R O"]]:
        """Returns the two factors of rank R, each with the square roots of the singular values, so
        that they are of like size when they are trained."""
        half = np.sqrt(self.s[:rank])
        return self.u[:, :rank] * half, half[:, None] * self.v[:rank]

    def rank_of_energy(self, energy: float) -> int:
        """Returns the fewest singular values whose squares are the share `energy` of the sum."""
        squares = np.cumsum(np.square(self.s))
        return min(int(np.searchsorted(squares, energy * squares[-1])) + 1, len(self.s))


def decompose(
    matrix: Float[np.ndarray, "I O"], moments: Float[np.ndarray, "I I"] | None = None
) -> Svd:
    """Returns the decomposition that is best in the weights or, where the second moments x x^T of
    the inputs are given, in the outputs over the calibration text.

    With S S^T = moments (Cholesky), their squared error is ||S^T (W - W')||^2, so S^T W is
    truncated and S^-T put in front again (SVD-LLM, arXiv:2403.07378, section 3.1).
    """
    matrix = np.asarray(matrix, np.float64)
    if moments is None:
        return Svd(*np.linalg.svd(matrix, full_matrices=False))
    root = root_of(moments)
    u, s, v = np.linalg.svd(root.T @ matrix, full_matrices=False)
    return Svd(solve_triangular(root, u, lower=True, trans="T"), s, v)


def root_of(moments: Float[np.ndarray, "I I"]) -> Float[np.ndarray, "I I"]:
    """Returns the lower triangular S with S S^T = moments and, on the diagonal, the least ridge
    with which there is one: sums in float32 of inputs a few of which are far larger than the
    others may have eigenvalues a little below 0."""
    mean = max(np.trace(moments) / len(moments), 1e-30)
    if not np.isfinite(mean):
        raise BadInput("the model's hidden states on the calibration text are not finite numbers")
    ridge = RIDGE
    while True:  # with a ridge of all eigenvalues' size there is one
        try:
            return np.linalg.cholesky(moments + ridge * mean * np.eye(len(moments)))
        except np.linalg.LinAlgError:
            ridge *= 10


def largest_rank(inputs: int, outputs: int) -> int:
    """Returns the highest rank at which two factors hold fewer numbers than the matrix."""
    return -(-inputs * outputs // (inputs + outputs)) - 1


def svd(source: Source, argument: float, options: Options) -> tuple[Config, dict]:
    """Returns the model with the chosen projections as two factors, wherever these are smaller.

    `argument` is the rank, or below 1 the share of the energy (the sum of squared singular values)
    that is kept in the layer that needs the highest rank. Raises `BadInput` if nothing gets
    smaller.
    """
    name, ranks, kernels = f"svd:{argument:g}", {}, {}
    stacked = dict(projections(source.params["blocks"]))
    for owner, layers in _decompositions(source, options).items():
        rank = int(argument) if argument >= 1 else max(d.rank_of_energy(argument) for d in layers)
        if rank <= largest_rank(len(layers[0].u), layers[0].v.shape[1]):
            ranks[owner] = rank
            kernels[owner] = factorised(owner, stacked[owner], layers, rank)
    if not ranks:
        raise BadInput(
            f"--method={name} makes no projection smaller: choose a lower rank or energy"
        )
    listed = ",".join(f"{target}={rank}" for target, rank in ranks.items())
    say(f"ranks       {listed.replace(',', ', ')}")
    config = with_shrink(source.config, name, ranks=listed)
    return config, with_kernels(source.params, kernels)


def tt(source: Source, argument: int, options: Options) -> tuple[Config, dict]:
    """Returns the model with its embeddings, and its head, as tensor trains of rank `argument` (see
    `parameters.tensor_train`). Raises `BadInput` if these are no smaller."""
    params = {}
    for name in ("tokens", "head"):
        if (table := source.params.get(name)) is None:
            continue
        table = np.array(table)
        table[source.config.model.vocab_size :] = 0  # what no token has
        cores = tensor_train.decompose(table, argument)
        numbers = sum(core.size for core in cores)
        if numbers >= table.size:
            raise BadInput(
                f"--method=tt:{argument} makes the embeddings no smaller: {numbers:,} numbers"
                f" instead of {table.size:,}; choose a lower rank"
            )
        error = np.linalg.norm(table - np.asarray(whole(cores, table.shape)))
        say(
            f"{name:<11} {numbers:,} numbers instead of {table.size:,}, relative error"
            f" {error / np.linalg.norm(table):.3f}"
        )
        params[name] = {
            n: c.astype(table.dtype) for n, c in zip(tensor_train.NAMES, cores, strict=True)
        }
    config = with_shrink(source.config, f"tt:{argument}", tensor_train=argument)
    return config, source.params | params


def whole(cores: list[np.ndarray], shape: tuple[int, int]) -> Float[np.ndarray, "V D"]:
    """Returns the table that the cores stand for."""
    a, b, c = cores
    left = np.einsum("urds,vset->uvdet", a, b, optimize=True)
    return np.einsum("uvdet,wtfz->uvwdef", left, c, optimize=True).reshape(shape)


def factorised(
    owner: str, kernel: np.ndarray, layers: list[Svd], rank: int
) -> dict[str, np.ndarray]:
    """Returns the factors [L, inputs, R] and [L, R, outputs] of a projection's stacked kernels, in
    the kernel's own axes of inputs and outputs."""
    first_output = INPUTS_OUTPUTS[owner][1][0]
    shapes = (*kernel.shape[1:first_output], rank), (rank, *kernel.shape[first_output:])
    parts = zip(*(layer.factors(rank) for layer in layers), strict=True)
    return {
        name: np.stack(part).reshape(len(layers), *shape).astype(kernel.dtype)
        for name, part, shape in zip(("factor_in", "factor_out"), parts, shapes, strict=True)
    }


def _decompositions(source: Source, options: Options) -> dict[str, list[Svd]]:
    """Returns the decompositions of every layer's chosen projections by name."""
    count = source.calibration(options.calibration)
    say(f"ranks       {f'for the inputs of {count} windows' if count else 'for the weights alone'}")
    moments = input_moments(source, count) if count else itertools.repeat({})
    targets = options.targets.split(",") if options.targets else LORA_TARGETS
    kernels = dict(projections(source.params["blocks"]))
    found: dict = {owner: [] for owner in kernels if owner in targets}
    for layer, of_layer in zip(range(source.config.model.num_layers), moments, strict=False):
        for owner, layers in found.items():
            matrix = as_matrix(owner, kernels[owner])[0][layer]
            u, s, v = decompose(matrix, of_layer.get(owner))
            most = max(1, largest_rank(*matrix.shape))
            layers.append(Svd(*(np.float32(a) for a in (u[:, :most], s, v[:most]))))
    return found
