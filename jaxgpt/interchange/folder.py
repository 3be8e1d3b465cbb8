"""A folder of someone else's: its config and its tensors by name, whatever files hold them."""

import dataclasses
import math
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from jaxgpt.config import Config, ModelConfig
from jaxgpt.config.validate import validate
from jaxgpt.interchange.families import FAMILIES, GPT2, Family
from jaxgpt.interchange.safetensors import SafetensorsFile
from jaxgpt.interchange.tf_checkpoint import TfCheckpoint
from jaxgpt.interchange.torch_file import TorchFile
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import check_json, parse_json

FLOATS = ("float64", "float32", "float16", "bfloat16")
SIZES = ("vocab_size", "num_heads", "head_dim", "embed_dim", "mlp_dim")  # each an axis of a tensor
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
        try:
            values = file.read(inner)
            return values.reshape(_squeezed(file, values.shape))
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
            raise BadInput(f"{self.path}: tensor {name} cannot be read: {e}") from e

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
        return _opened(path, GPT2, hf, names)
    if not (path / "config.json").is_file():
        raise BadInput(f"{path} holds neither config.json (Hugging Face) nor hparams.json (OpenAI)")
    hf = _json(path / "config.json")
    family = FAMILIES.get(str(hf.get("model_type")))
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
                if plain in names:
                    raise BadInput(f"{path} holds tensor {plain} twice")
                names[plain] = (file, name)
    return _opened(path, family, hf, names)


def _opened(path: Path, family: Family, hf: dict, names: dict[str, tuple]) -> Folder:
    """Returns the folder, its config checked against what its files hold."""
    for name, (file, inner) in names.items():
        if file.dtypes[inner].name not in FLOATS:
            raise BadInput(f"{path}: tensor {name} holds {file.dtypes[inner]}, no weights")
    files = {id(file): file for file, _ in names.values()}.values()
    claimed = sum(
        math.prod(file.shapes[inner]) * file.dtypes[inner].itemsize
        for file, inner in names.values()
    )
    if claimed > 2 * sum(file.size for file in files):  # a tied head may share the embedding's
        raise BadInput(
            f"{path}: its tensors overlap: they take {claimed} bytes, more than its files"
        )
    model = _model(family, hf, path)
    largest = max(
        (max(shape, default=0) for shape in _shapes(names) if math.prod(shape)), default=0
    )
    for field in SIZES:
        if getattr(model, field) > largest:
            raise BadInput(
                f"{path}: its config says {field}={getattr(model, field)}, but no tensor has more"
                f" than {largest} rows or columns"
            )
    if model.num_layers > len(names):
        raise BadInput(
            f"{path}: its config says {model.num_layers} layers,"
            f" its files hold {len(names)} tensors"
        )
    return Folder(path, family, model, hf, names)


def _shapes(names: dict[str, tuple]) -> list[tuple]:
    return [file.shapes[inner] for file, inner in names.values()]


def _model(family: Family, hf: dict, path: Path) -> ModelConfig:
    try:
        check_json(hf, family.schema)
        model = family.model(hf)
        for field in (*SIZES, "num_layers", "max_seq_len", "num_kv_heads"):
            least = 0 if field in ("num_kv_heads", "head_dim") else 1  # 0: derived from the others
            if not least <= getattr(model, field) < 1 << 31:
                raise ValueError(f"{field} is {getattr(model, field)}")
        model = model.with_sizes()
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise BadInput(f"{path}: its config lacks or garbles a field: {e!r}") from e
    try:
        validate(Config(model=model))
    except BadInput as e:
        raise BadInput(f"{path}: its config describes no model: {e}") from e
    return model


def _json(file: Path) -> dict:
    try:
        if not file.is_file():
            raise OSError("it is not a file")
        return parse_json(file.read_bytes(), dict)
    except (OSError, ValueError) as e:
        raise BadInput(f"{file} cannot be read as a JSON object: {e}") from e


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
    names = {"n_positions": "n_ctx", "vocab_size": "n_vocab"}
    names |= {name: name for name in ("n_embd", "n_head", "n_layer")}
    if missing := [theirs for theirs in names.values() if theirs not in hparams]:
        raise BadInput(f"hparams.json lacks {', '.join(missing)}")
    return {"model_type": "gpt2"} | {ours: hparams[theirs] for ours, theirs in names.items()}


def _openai_name(name: str) -> str:
    """`model/h0/attn/c_attn/w` to `h.0.attn.c_attn.weight`."""
    parts = name.removeprefix("model/").split("/")
    if match := re.fullmatch(r"h(\d+)", parts[0]):
        parts[0:1] = ["h", match[1]]
    ends = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    return ".".join([*parts[:-1], ends.get(parts[-1], parts[-1])])
