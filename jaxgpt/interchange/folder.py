"""A folder of someone else's: its config and its tensors by name, whatever files hold them."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from jaxgpt.config import BadInput, ModelConfig
from jaxgpt.interchange.families import FAMILIES, GPT2, Family
from jaxgpt.interchange.safetensors import SafetensorsFile
from jaxgpt.interchange.tf_checkpoint import TfCheckpoint
from jaxgpt.interchange.torch_file import TorchFile

WEIGHTS = (("model.safetensors", SafetensorsFile), ("pytorch_model.bin", TorchFile))


@dataclasses.dataclass(frozen=True)
class Folder:
    """A model on disk: nothing but headers has been read yet.

    `names` gives for each tensor, by its family's name, the file object and its name there.
    """

    path: Path
    family: Family
    model: ModelConfig
    hf_config: dict
    names: dict[str, tuple]

    def shape(self, name: str) -> tuple:
        """Returns a tensor's shape."""
        file, inner = self.names[name]
        return _squeezed(file, file.shapes[inner])

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, read from its file now."""
        file, inner = self.names[name]
        values = file.read(inner)
        return values.reshape(_squeezed(file, values.shape))

    @property
    def is_bfloat16(self) -> bool:
        """Says whether every tensor is stored in bfloat16."""
        return all(file.dtypes[inner].name == "bfloat16" for file, inner in self.names.values())


def _squeezed(file, shape: tuple) -> tuple:
    """OpenAI's kernels are those of a convolution of width 1."""
    return shape[1:] if isinstance(file, TfCheckpoint) and len(shape) == 3 else shape


def is_model_folder(path: Path) -> bool:
    """Says whether `path` looks like a folder that `open_folder` reads."""
    config = path / "config.json"
    if (path / "hparams.json").is_file():
        return True
    return config.is_file() and "model_type" in _json(config)


def open_folder(path: Path) -> Folder:
    """Opens a Hugging Face folder of GPT-2, Llama or Qwen3, or OpenAI's GPT-2 release.

    Raises:
      BadInput: if it is none of these, a file is missing or damaged, or the architecture has a
        part that jaxgpt's has not.
    """
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder")
    if (path / "hparams.json").is_file():
        hf = _openai_config(_json(path / "hparams.json"))
        file = TfCheckpoint(path)
        names = {_openai_name(name): (file, name) for name in file.shapes}
        return Folder(path, GPT2, _model(GPT2, hf, path), hf, names)
    if not (path / "config.json").is_file():
        raise BadInput(f"{path} holds neither config.json (Hugging Face) nor hparams.json (OpenAI)")
    hf = _json(path / "config.json")
    family = FAMILIES.get(hf.get("model_type"))
    if family is None:
        raise BadInput(
            f"{path}/config.json: model_type={hf.get('model_type')!r} is not supported; only"
            f" {', '.join(FAMILIES)} are"
        )
    names = {}
    for file in _files(path):
        for name in file.shapes:
            plain = name.removeprefix(family.prefix) if family.prefix else name
            if not plain.endswith(family.ignored or ("\0",)):
                names[plain] = (file, name)
    return Folder(path, family, _model(family, hf, path), hf, names)


def _model(family: Family, hf: dict, path: Path) -> ModelConfig:
    try:
        return family.model(hf).with_sizes()
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise BadInput(f"{path}: its config lacks or garbles a field: {e!r}") from e


def _json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{file} cannot be read as JSON: {e}") from e
    if not isinstance(found, dict):
        raise BadInput(f"{file} holds no JSON object")
    return found


def _files(path: Path) -> list:
    for name, kind in WEIGHTS:
        if (path / name).is_file():
            return [kind(path / name)]
        index = path / f"{name}.index.json"
        if index.is_file():
            where = _json(index).get("weight_map")
            if not isinstance(where, dict):
                raise BadInput(f"{index} has no weight_map")
            shards = sorted({str(shard) for shard in where.values()})
            for shard in shards:
                if not re.fullmatch(r"[\w.-]+", shard) or shard.startswith("."):
                    raise BadInput(f"{index} names {shard!r}, which is no file beside it; refused")
                if not (path / shard).is_file():
                    raise BadInput(f"{path / shard} is missing: {index.name} names it")
            return [kind(path / shard) for shard in shards]
    raise BadInput(f"{path} holds no weights: model.safetensors or pytorch_model.bin")


def _openai_config(hparams: dict) -> dict:
    try:
        return {
            "model_type": "gpt2",
            "vocab_size": hparams["n_vocab"],
            "n_positions": hparams["n_ctx"],
            "n_embd": hparams["n_embd"],
            "n_head": hparams["n_head"],
            "n_layer": hparams["n_layer"],
        }
    except KeyError as e:
        raise BadInput(f"hparams.json lacks {e}") from e


def _openai_name(name: str) -> str:
    """`model/h0/attn/c_attn/w` to `h.0.attn.c_attn.weight`."""
    parts = name.removeprefix("model/").split("/")
    if match := re.fullmatch(r"h(\d+)", parts[0]):
        parts[0:1] = ["h", match[1]]
    ends = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    return ".".join([*parts[:-1], ends.get(parts[-1], parts[-1])])
