"""Our parameters from a model folder's tensors, and the other way round."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from jaxgpt.config import ModelConfig
from jaxgpt.config.experts import layers_with
from jaxgpt.interchange.families import Family, Rule
from jaxgpt.interchange.folder import Folder
from jaxgpt.interchange.safetensors import write_safetensors
from jaxgpt.metrics.progress import Bar
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path

TABLES = ("tokens", "head", "head_bias")  # a row per token, padded to a multiple of 128 rows


def read_params(folder: Folder, abstract: dict) -> dict:
    """Returns the folder's weights as the nested dict whose shapes and dtypes are `abstract`'s.

    Besides the result, only one tensor of the folder is in memory at a time. Rows that pad the
    vocabulary are zero.

    Raises:
      BadInput: naming the tensor that is missing, has the wrong shape, is not part of the model, or
        is not finite.
    """
    ours = leaves_by_path(abstract)
    tensors = tensors_of(folder.family, ours, folder.model)
    tied = folder.family.heads if "head" not in ours else set()
    if missing := sorted(set(tensors) - set(folder.names)):
        raise BadInput(f"{folder.path} lacks {_some(missing)}")
    if extra := sorted(set(folder.names) - set(tensors) - tied):
        raise BadInput(f"{folder.path} has tensors that {folder.family.name} lacks: {_some(extra)}")
    for name, tensor in tensors.items():
        if folder.shape(name) != tensor.shape:
            raise BadInput(
                f"{folder.path}: tensor {name} has shape {folder.shape(name)}, its config says"
                f" {tensor.shape}"
            )
    params = {path: _aligned_zeros(leaf.shape, leaf.dtype) for path, leaf in ours.items()}
    # the largest tensors first: they are freed before most of the result is in memory
    largest_first = sorted(tensors.items(), key=lambda item: -np.prod(item[1].shape))
    total = sum(value.nbytes for value in params.values())
    with Bar("import   ", total) as bar:
        for name, tensor in largest_first:
            values = tensor.rule.to_ours(folder.read(name), tensor.shapes)
            for target, value in zip(tensor.arrays(params), values, strict=True):
                with np.errstate(over="ignore"):  # float64's largest become infinite
                    target[:] = value
                if not np.isfinite(target).all():
                    raise BadInput(f"{folder.path}: tensor {name} holds NaN or infinite numbers")
                bar.advance(target.nbytes)
    return unflatten_dict(params, sep="/")


def write_params(file: Path, family: Family, params: dict, cfg: ModelConfig, dtype) -> None:
    """Writes `params` as the family's tensors, one at a time, without the vocabulary's padding."""
    ours = leaves_by_path(params)
    tensors = {
        family.stored_name(name): tensor for name, tensor in tensors_of(family, ours, cfg).items()
    }

    def read(name: str) -> np.ndarray:
        array = tensors[name].rule.to_theirs(tensors[name].arrays(ours))
        bar.advance(array.nbytes)
        return array

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with Bar("export   ", sum(leaf.nbytes for leaf in ours.values())) as bar:
        write_safetensors(file, shapes, np.dtype(dtype), read)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of theirs: its rule, its place in our arrays (the row of its layer, its expert), and
    the shapes of what it contains of ours: of a stack the shape of one layer, of a table the shape
    without padding rows.
    """

    rule: Rule
    index: tuple[int, ...]
    shapes: list[tuple]

    @property
    def shape(self) -> tuple:
        """Its shape."""
        return self.rule.shape(self.shapes)

    def arrays(self, params: dict) -> list[np.ndarray]:
        """Returns what it contains of `params`, as views where those are NumPy's."""
        arrays = [params[path][self.index] for path in self.rule.ours]
        return [np.asarray(a)[: shape[0]] for a, shape in zip(arrays, self.shapes, strict=True)]


def tensors_of(family: Family, ours: dict, cfg: ModelConfig) -> dict[str, Tensor]:
    """Returns the family's tensors by name, for a model whose arrays by path are `ours`."""
    tensors = {}
    for rule in family.rules_of(ours):
        axes = ("{layer}" in rule.theirs) + ("{expert}" in rule.theirs)
        shapes = [tuple(ours[path].shape)[axes:] for path in rule.ours]
        if rule.ours[0] in TABLES:
            shapes = [(cfg.vocab_size, *shape[1:]) for shape in shapes]
        first, counts = rule.ours[0], ours[rule.ours[0]].shape[:axes]
        layers = _layers(first, counts, cfg)
        for index in np.ndindex(*counts):
            layer = layers[index[0]] if index else 0
            name = rule.theirs.format(layer=layer, expert=index[-1] if index else 0)
            tensors[name] = Tensor(rule, index, shapes)
    return tensors


def _layers(path: str, counts: tuple, cfg: ModelConfig) -> Sequence[int]:
    """Returns the layers whose arrays are stacked at `path`."""
    own = path.removeprefix("blocks/")
    return layers_with(own, cfg) if own != path else range(counts[0] if counts else 0)


def _aligned_zeros(shape: tuple, dtype) -> np.ndarray:
    """Returns zeros at an address divisible by 64, which JAX on a CPU uses without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
