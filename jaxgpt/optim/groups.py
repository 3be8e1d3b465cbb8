"""Which parameter is treated how: by the words of its path."""

import re
from collections.abc import Callable

import jax

from jaxgpt.config import BadInput, ModelConfig

MATRICES = ("kernel", "tokens", "head")  # the last word of a parameter's path
VECTORS = ("bias", "scale")


def path_of(path: tuple) -> str:
    """Returns a tree path as people write it: `blocks/mlp/up/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(choose: Callable[[str], object], params: dict) -> dict:
    """Returns `choose(path)` for every parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, _: choose(path_of(path)), params)


def decay_mask(params: dict) -> dict:
    """Returns True for the matrices (embeddings included), False for biases and norm scales.

    By name, not by rank: stacking over layers and splitting into heads add axes to a bias. A
    name that is neither is an error, so that every parameter is covered on purpose.
    """

    def decays(path: str) -> bool:
        name = path.split("/")[-1]
        if name not in MATRICES + VECTORS:
            raise ValueError(f"no rule says whether parameter {path} decays")
        return name in MATRICES

    return by_path(decays, params)


def is_hidden_matrix(path: str) -> bool:
    """Says whether a parameter is a matrix between hidden layers: what Muon and muP treat apart."""
    return path.startswith("blocks/") and path.endswith("/kernel")


def parse_multipliers(text: str) -> list[tuple[re.Pattern, float]]:
    """Returns the (path pattern, factor) pairs of `optim.lr_multipliers`.

    Raises:
      BadInput: naming the part that is not `pattern=factor`.
    """
    found = []
    for part in filter(None, text.split(",")):
        pattern, _, factor = part.rpartition("=")
        try:
            found.append((re.compile(pattern), float(factor)))
        except (re.error, ValueError) as e:
            raise BadInput(
                f"optim.lr_multipliers: {part!r} is not PATTERN=FACTOR, for example tokens=0.1"
            ) from e
        if not pattern or not found[-1][1] >= 0:
            raise BadInput(f"optim.lr_multipliers: {part!r} needs a pattern and a factor >= 0")
    return found


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
