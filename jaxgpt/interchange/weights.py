"""Our parameters from a model folder's tensors, and the other way round."""

from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from jaxgpt.config import ModelConfig
from jaxgpt.interchange.families import Family, Rule
from jaxgpt.interchange.folder import Folder
from jaxgpt.interchange.safetensors import write_safetensors
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path

TABLES = ("tokens", "head")  # one row per token, padded to a multiple of 128 rows


def read_params(folder: Folder, abstract: dict) -> dict:
    """Returns the folder's weights as the nested dict whose shapes and dtypes are `abstract`'s.

    Besides the result, only one tensor of the folder is in memory at a time. Rows that pad the
    vocabulary are zero.

    Raises:
      BadInput: naming the tensor that is missing, has the wrong shape, is not part of the model, or
        is not finite.
    """
    ours, cfg = leaves_by_path(abstract), folder.model
    tensors = tensors_of(folder.family.rules_of(ours), cfg.num_layers)
    tied = {"lm_head.weight"} if "head" not in ours else set()
    if missing := sorted(set(tensors) - set(folder.names)):
        raise BadInput(f"{folder.path} lacks {_some(missing)}")
    if extra := sorted(set(folder.names) - set(tensors) - tied):
        raise BadInput(f"{folder.path} has tensors that {folder.family.name} lacks: {_some(extra)}")
    shapes = {name: our_shapes(*tensors[name], ours, cfg.vocab_size) for name in tensors}
    for name, (rule, _) in tensors.items():
        if folder.shape(name) != rule.shape(shapes[name]):
            raise BadInput(
                f"{folder.path}: tensor {name} has shape {folder.shape(name)}, its config says"
                f" {rule.shape(shapes[name])}"
            )
    params = {path: _aligned_zeros(leaf.shape, leaf.dtype) for path, leaf in ours.items()}
    # the largest tensors first: they are freed before most of the result is in memory
    for name in sorted(tensors, key=lambda name: -np.prod(folder.shape(name))):
        rule, layer = tensors[name]
        for path, values in zip(rule.ours, rule.to_ours(folder.read(name), shapes[name])):
            target = params[path] if layer is None else params[path][layer]
            target = target[: len(values)]
            with np.errstate(over="ignore"):  # float64's largest become infinite
                target[:] = values
            if not np.isfinite(target).all():
                raise BadInput(f"{folder.path}: tensor {name} holds NaN or infinite numbers")
    return unflatten_dict(params, sep="/")


def write_params(file: Path, family: Family, params: dict, cfg: ModelConfig, dtype) -> None:
    """Writes `params` as the family's tensors, one at a time, without the vocabulary's padding."""
    ours = leaves_by_path(params)
    tensors = {
        name if name == "lm_head.weight" else family.prefix + name: tensor
        for name, tensor in tensors_of(family.rules_of(ours), cfg.num_layers).items()
    }

    def read(name: str) -> np.ndarray:
        rule, layer = tensors[name]
        arrays = [np.asarray(ours[p] if layer is None else ours[p][layer]) for p in rule.ours]
        shapes = our_shapes(rule, layer, ours, cfg.vocab_size)
        return rule.to_theirs([a[: shape[0]] for a, shape in zip(arrays, shapes)])

    shapes = {
        name: rule.shape(our_shapes(rule, layer, ours, cfg.vocab_size))
        for name, (rule, layer) in tensors.items()
    }
    write_safetensors(file, shapes, np.dtype(dtype), read)


def tensors_of(rules: list[Rule], num_layers: int) -> dict[str, tuple[Rule, int | None]]:
    """Returns the rule and the layer (None: no layer's) of each tensor that `rules` name."""
    tensors: dict[str, tuple[Rule, int | None]] = {}
    for rule in rules:
        if "{layer}" in rule.theirs:
            tensors |= {rule.theirs.format(layer=i): (rule, i) for i in range(num_layers)}
        else:
            tensors[rule.theirs] = (rule, None)
    return tensors


def our_shapes(rule: Rule, layer: int | None, ours: dict, vocab_size: int) -> list[tuple]:
    """Returns the shapes of those of `ours` that are in one tensor: of a stack the shape of one
    layer, of a table the shape without padding rows."""
    shapes = []
    for path in rule.ours:
        shape = tuple(ours[path].shape if layer is None else ours[path].shape[1:])
        shapes.append((vocab_size, *shape[1:]) if path in TABLES else shape)
    return shapes


def _aligned_zeros(shape: tuple, dtype) -> np.ndarray:
    """Returns zeros at an address divisible by 64, which JAX on a CPU uses without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
