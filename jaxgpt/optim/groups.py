"""Which parameter is treated how: by the words of its path."""

import math
import re
from collections.abc import Callable

import jax

from jaxgpt.config import ModelConfig
from jaxgpt.config.validate import parse_patterns
from jaxgpt.parameters.lora import is_addition
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaf_path, leaves_by_path

# Beside the model's parameters: what an objective trains for itself, by its argument's name
OWN = "objective"
# The last word of a parameter's path
MATRICES = ("kernel", "tokens", "types", "head", "lora_in", "lora_out", "factor_in", "factor_out")
MATRICES += ("core_0", "core_1", "core_2")  # of `parameters.tensor_train`
VECTORS = ("bias", "scale", "magnitude", "head_bias")

# Kernel axes: layer first, then inputs, then outputs (see the einsums in `model`).
INPUTS_OUTPUTS = {
    "query": ((1,), (2, 3)),
    "key": ((1,), (2, 3)),
    "value": ((1,), (2, 3)),
    "out": ((1, 2), (3,)),
    "gate": ((1,), (2,)),
    "up": ((1,), (2,)),
    "down": ((1,), (2,)),
    "router": ((1,), (2,)),
}


def inputs_outputs(path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns which axes of the stacked kernel or factor (see `parameters.weights`) at `path` are
    inputs and which outputs; the rank is the one's output and the other's input."""
    *_, owner, _ = path.removesuffix("/factor_in").removesuffix("/factor_out").split("/")
    inputs, outputs = INPUTS_OUTPUTS[owner]
    if "/experts/" in path:  # the axis of experts comes after that of layers
        inputs, outputs = (tuple(axis + 1 for axis in axes) for axes in (inputs, outputs))
    if path.endswith("/factor_in"):
        return inputs, (inputs[-1] + 1,)
    if path.endswith("/factor_out"):
        return (1,), tuple(range(2, 2 + len(outputs)))
    return inputs, outputs


def by_path(choose: Callable[[str], object], params: dict) -> dict:
    """Returns `choose(path)` for every parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, _: choose(leaf_path(path)), params)


def decay_mask(params: dict) -> dict:
    """Returns True for the matrices (embeddings included), False for biases, those of attention
    scores too, and norm scales.

    By name, not by rank: stacking over layers and splitting into heads add axes to a bias. A
    name that is neither is an error, so that every parameter is covered on purpose.
    """

    def decays(path: str) -> bool:
        name = path.split("/")[-1]
        if name not in MATRICES + VECTORS:
            raise ValueError(f"no rule says whether parameter {path} decays")
        return name in MATRICES and not path.endswith("relative/kernel")

    return by_path(decays, params)


def trainable(params: dict, freeze: str, lora_rank: int) -> dict:
    """Returns True for the parameters that are trained: all but the frozen; with LoRA, its own.
    Raises `BadInput` if a pattern matches none, or that leaves none."""
    patterns, paths = parse_patterns(freeze, "optim.freeze"), leaves_by_path(params)
    for pattern in patterns:
        if not any(map(pattern.search, paths)):
            raise BadInput(f"optim.freeze: {pattern.pattern!r} matches no parameter")

    def is_trained(path: str) -> bool:
        is_frozen = any(pattern.search(path) for pattern in patterns)
        return not is_frozen and (not lora_rank or is_addition(path) or is_own(path))

    mask = by_path(is_trained, params)
    if not any(jax.tree.leaves(mask)):
        raise BadInput(f"optim.freeze={freeze!r} leaves no parameter to train")
    return mask


def is_own(path: str) -> bool:
    """Says whether a parameter is the objective's, not the model's."""
    return path.startswith(f"{OWN}/")


def split(params: dict, mask: dict) -> tuple[dict, dict]:
    """Returns (trained, frozen): the same tree twice, with None for what the other holds."""
    trained = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, params)
    frozen = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, params)
    return trained, frozen


def join(trained: dict, frozen: dict) -> dict:
    """Returns the tree that `split` took apart."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None
    )


def as_matrices(blocks: dict, stacked: int = 1) -> dict:
    """Returns the stacked parameters of the blocks with each layer's own part as one matrix or
    vector: kernels as [L, inputs, outputs], LoRA's as [L, inputs, R] and [L, R, outputs], biases
    and scales as [L, outputs]. Those of experts are `stacked` over two axes.
    """

    def flat(path: tuple, leaf):
        name = leaf_path(path).split("/")[-1]
        layers, shape = leaf.shape[:stacked], leaf.shape[stacked:]
        if name in VECTORS:
            return leaf.reshape(*layers, -1)
        inputs = {"lora_in": len(shape) - 1, "lora_out": 1}.get(name)
        inputs = inputs or len(inputs_outputs(leaf_path(path))[0])
        return leaf.reshape(*layers, math.prod(shape[:inputs]), math.prod(shape[inputs:]))

    return jax.tree_util.tree_map_with_path(flat, blocks)


def is_hidden_matrix(path: str) -> bool:
    """Says whether a parameter is a matrix between hidden layers: what Muon and muP treat apart."""
    words = path.split("/")
    is_matrix = words[-1] in ("kernel", "factor_in", "factor_out")
    return "blocks" in words[:2] and is_matrix and "router" not in words


def parse_multipliers(text: str) -> list[tuple[re.Pattern, float]]:
    """Returns the (path pattern, factor) pairs of `optim.lr_multipliers`. Raises `BadInput`, naming
    the part that is not `pattern=factor`."""
    multipliers = []
    for part in filter(None, text.split(",")):
        pattern, _, factor = part.rpartition("=")
        try:
            multipliers.append((re.compile(pattern), float(factor)))
        except (re.error, ValueError) as e:
            raise BadInput(
                f"optim.lr_multipliers: {part!r} is not PATTERN=FACTOR, for example tokens=0.1"
            ) from e
        if not pattern or not multipliers[-1][1] >= 0:
            raise BadInput(f"optim.lr_multipliers: {part!r} needs a pattern and a factor >= 0")
    return multipliers


def lr_factors(params: dict, multipliers: str, model: ModelConfig) -> dict:
    """Returns each parameter's learning-rate factor: the first matching pattern's, and muP's.

    muP divides the rate of hidden matrices by the width ratio (arXiv:2203.03466, table 8, Adam).

    Raises:
      BadInput: if a pattern matches no parameter.
    """
    patterns, matched = parse_multipliers(multipliers), set()

    def factor(path: str) -> float:
        base = 1 / model.width_ratio if is_hidden_matrix(path) else 1.0
        for pattern, value in patterns:
            if pattern.search(path):
                matched.add(pattern)
                return base * value
        return base

    factors = by_path(factor, params)
    for pattern, _ in patterns:
        if pattern not in matched:
            raise BadInput(f"optim.lr_multipliers: {pattern.pattern!r} matches no parameter")
    return factors
