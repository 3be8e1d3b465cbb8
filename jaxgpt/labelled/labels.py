"""Names of classes: as rows give them, as the config lists them, and their numbers."""

import json
from collections.abc import Sequence

import numpy as np

from jaxgpt.labelled.rows import Row
from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput

MOST = 10_000  # more names are probably no labels, but texts
BALANCED = "balanced"


def label_text(value: object, row: Row, name: str) -> str:
    """Returns a label's name: text, or a whole number or truth value written as text. Raises
    `BadInput` if it is something else or empty."""
    if type(value) is bool:
        return str(value).lower()
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadInput(
            f"{row.where}: label {name!r} must be text or a whole number, not {value!r:.80}"
        )
    return check_text(value.strip(), f"{row.where}, field {name!r},")


def in_order(names: Sequence[str]) -> list[str]:
    """Returns the names sorted: whole numbers by value, before others."""
    return sorted(names, key=lambda name: (not _is_number(name), _number(name), name))


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name.isascii() and len(name) < 16


def _number(name: str) -> int:
    return int(name) if _is_number(name) else 0


def parse_labels(text: str, field: str) -> list[str]:
    """Returns the names that a config's field lists: comma-separated, or as a list of JSON. Raises
    `BadInput` if one is empty or there twice, or there are fewer than two."""
    names = text.split(",")
    if text.lstrip().startswith("["):
        try:
            names = json.loads(text)
        except ValueError as e:
            raise BadInput(f"{field} is no list of JSON: {e}") from e
    if not all(isinstance(name, str) for name in names):
        raise BadInput(f"{field}={text!r} must list texts")
    names = [name.strip() for name in names]
    if not all(names) or len(set(names)) < len(names) or len(names) < 2:
        raise BadInput(f"{field}={text!r} must list two or more different names")
    return names


def format_labels(names: Sequence[str]) -> str:
    """Returns what `parse_labels` reads as these names."""
    is_plain = not any("," in name for name in names) and not names[0].startswith("[")
    return ",".join(names) if is_plain else json.dumps(list(names), ensure_ascii=False)


def ids_of(stored: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Returns the number of each `stored` name among `names`, -1 for an unknown one. Where rows
    have numbers and `names` other words, number i is the i-th name."""
    index = {name: i for i, name in enumerate(names)}
    if not any(name in index for name in stored):
        index |= {str(i): i for i in range(len(names))}
    return np.array([index.get(name, -1) for name in stored], np.int32)


def parse_weights(text: str, count: int, field: str) -> np.ndarray:
    """Returns the weight of each of `count` classes that a config's field lists (after "balanced",
    those that the training part gave), all 1 for "". Raises `BadInput` if they are not so many
    numbers above 0."""
    if text in ("", BALANCED):
        return np.ones(count, np.float32)
    try:
        weights = [float(part) for part in text.removeprefix(BALANCED).split(",")]
    except ValueError as e:
        raise BadInput(f"{field}={text!r} is neither {BALANCED!r} nor numbers: {e}") from e
    if len(weights) != count or not all(0 < w < 1e6 for w in weights):
        raise BadInput(f"{field}={text!r} must be {count} numbers above 0, one for each label")
    return np.array(weights, np.float32)


def balanced_weights(counts: np.ndarray) -> str:
    """Returns what `parse_weights` reads: weights that make every class with examples count alike,
    their mean over the examples 1."""
    classes = max(np.count_nonzero(counts), 1)
    weights = counts.sum() / (classes * np.maximum(counts, 1))
    return f"{BALANCED} " + ",".join(f"{w:.6g}" for w in np.where(counts > 0, weights, 1))
