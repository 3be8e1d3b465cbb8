"""Parameters from their tensors, and tensors from our parameters."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.interchange.families import Family, Rule
from jaxgpt.interchange.folder import Folder
from jaxgpt.interchange.safetensors import write_safetensors
from jaxgpt.system.errors import BadInput

TABLES = ("tokens", "head")  # whose rows are padded


def read_params(folder: Folder, abstract: dict) -> dict:
    """Returns the folder's weights as the nested dict whose shapes and dtypes are `abstract`'s.

    Tensor by tensor: beside the result only one tensor of theirs is in memory. Rows that pad the
    vocabulary are zero.

    Raises:
      BadInput: naming the tensor that is missing, has another shape, belongs to nothing, or is
        not finite.
    """
    ours = flatten(abstract)
    rules = folder.family.rules_of(ours)
    expected = dict(_named(rules, folder.model.num_layers))
    tied = "lm_head.weight" in folder.names and "head" not in ours
    known = set(expected) | ({"lm_head.weight"} if tied else set())
    if missing := sorted(set(expected) - set(folder.names)):
        raise BadInput(f"{folder.path} lacks {_some(missing)}")
    if strange := sorted(set(folder.names) - known):
        raise BadInput(f"{folder.path} holds what {folder.family.name} has not: {_some(strange)}")
    vocab = folder.model.vocab_size
    for name, (rule, layer) in expected.items():
        shapes = [_shape(path, ours[path].shape, layer, vocab) for path in rule.ours]
        if folder.shape(name) != rule.shape(shapes):
            raise BadInput(
                f"{folder.path}: tensor {name} has shape {folder.shape(name)}, its config says"
                f" {rule.shape(shapes)}"
            )
    found = {path: _aligned_zeros(leaf.shape, leaf.dtype) for path, leaf in ours.items()}
    # the largest tensors first: their copies are gone before most of the result is in memory
    for name, (rule, layer) in sorted(expected.items(), key=lambda e: -np.prod(folder.shape(e[0]))):
        shapes = [_shape(path, ours[path].shape, layer, vocab) for path in rule.ours]
        parts = rule.take(folder.read(name), shapes)
        for path, part in zip(rule.ours, parts, strict=True):
            into = found[path] if layer is None else found[path][layer]
            with np.errstate(over="ignore"):  # float64's largest become infinite
                into[: len(part)] = part
            if not np.isfinite(into[: len(part)]).all():
                raise BadInput(f"{folder.path}: tensor {name} holds NaN or infinite numbers")
    return unflatten(found)


def write_params(file: Path, family: Family, params: dict, cfg: ModelConfig, dtype) -> None:
    """Writes `params` as the family's tensors, one at a time, without the vocabulary's padding."""
    ours = flatten(params)

    def of(path: str, layer: int | None) -> np.ndarray:
        array = np.asarray(ours[path] if layer is None else ours[path][layer])
        return array[: cfg.vocab_size] if path in TABLES else array

    named = dict(_named(family.rules_of(ours), cfg.num_layers))
    shapes = {
        name: rule.shape([_shape(p, ours[p].shape, layer, cfg.vocab_size) for p in rule.ours])
        for name, (rule, layer) in named.items()
    }

    def read(name: str) -> np.ndarray:
        rule, layer = named[name]
        return rule.give([of(path, layer) for path in rule.ours])

    prefix = family.prefix
    outside = {"lm_head.weight"}  # stands beside the decoder, not in it
    full = {name if name in outside else prefix + name: name for name in named}
    write_safetensors(
        file,
        {long: shapes[name] for long, name in full.items()},
        np.dtype(dtype),
        lambda long: read(full[long]),
    )


def _named(rules: list[Rule], num_layers: int) -> Iterator[tuple[str, tuple[Rule, int | None]]]:
    for rule in rules:
        if "{layer}" in rule.theirs:
            for layer in range(num_layers):
                yield rule.theirs.format(layer=layer), (rule, layer)
        else:
            yield rule.theirs, (rule, None)


def _shape(path: str, shape: tuple, layer: int | None, vocab: int) -> tuple:
    """The shape of one layer's part, of a table without padding."""
    shape = tuple(shape if layer is None else shape[1:])
    return (vocab, *shape[1:]) if path in TABLES else shape


def _aligned_zeros(shape: tuple, dtype) -> np.ndarray:
    """Zeros that start at a multiple of 64 bytes: JAX on a CPU then takes them without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def flatten(params: dict) -> dict:
    """Returns `{"blocks/mlp/up/kernel": leaf, ...}`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def unflatten(flat: dict) -> dict:
    """Returns the nested dict of `flatten`'s paths."""
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        inner = nested
        for part in parents:
            inner = inner.setdefault(part, {})
        inner[last] = leaf
    return nested
