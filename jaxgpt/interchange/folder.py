"""A model folder of Hugging Face's or OpenAI's: its config, and its tensors by name."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np

from jaxgpt.config import Config, ModelConfig
from jaxgpt.config.validate import validate
from jaxgpt.interchange.families import FAMILIES, GPT2, LATENT, Family
from jaxgpt.interchange.safetensors import SafetensorsFile
from jaxgpt.interchange.tf_checkpoint import TfCheckpoint
from jaxgpt.interchange.torch_file import TorchFile
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput, as_bad_input
from jaxgpt.system.files import check_json, read_json

FLOATS = ("float64", "float32", "float16", "bfloat16")
# Each an axis of a tensor
SIZES = ("vocab_size", "num_heads", "head_dim", "embed_dim", "mlp_dim", "type_vocab_size")
COUNTS = ("num_layers", "max_seq_len", "num_kv_heads", "encoder_layers", "max_source_len")
# Derived from others, or none
MAY_BE_0 = ("num_kv_heads", "head_dim", "encoder_layers", "max_source_len", "type_vocab_size")
# What a model of each kind is mostly trained by
OBJECTIVES = {"decoder": "causal_lm", "encoder": "masked_lm", "encoder_decoder": "seq2seq"}
OPENAI_FIELDS = {"n_ctx": "n_positions", "n_vocab": "vocab_size"}  # hparams.json: config.json
WEIGHTS = (("model.safetensors", SafetensorsFile), ("pytorch_model.bin", TorchFile))


@dataclasses.dataclass(frozen=True)
class Folder:
    """A model on disk, of which only the files' headers have been read.

    `names` maps the family's name of a tensor to its file object and its name in that file.
    `skipped` are the names of tensors that jaxgpt has no place for.
    """

    path: Path
    family: Family
    model: ModelConfig
    names: dict[str, tuple]
    skipped: tuple[str, ...] = ()

    def shape(self, name: str) -> tuple:
        """Returns a tensor's shape."""
        file, inner = self.names[name]
        return file.shapes[inner]

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, read from its file."""
        file, inner = self.names[name]
        with as_bad_input(lambda e: f"{self.path}: tensor {name} cannot be read: {e}"):
            return file.read(inner)

    @property
    def is_bfloat16(self) -> bool:
        """Says whether every tensor is stored in bfloat16."""
        return all(file.dtypes[inner].name == "bfloat16" for file, inner in self.names.values())


def is_model_folder(path: Path) -> bool:
    """Says whether `path` looks like a folder that `open_folder` reads."""
    if (path / "hparams.json").is_file():
        return True
    config = path / "config.json"
    return config.is_file() and "model_type" in read_json(config, dict)


def name_on_hub(path: Path) -> str:
    """Says, for the end of a message, how a model of the hub is named; guesses GPT-2's."""
    if re.fullmatch("gpt2(-medium|-large|-xl)?", str(path)):
        return f"did you mean openai-community/{path}, of the Hugging Face hub?"
    return "a model of the Hugging Face hub is named OWNER/NAME, like openai-community/gpt2"


def check_folder(path: Path) -> None:
    """Raises `BadInput` if there is no folder at `path`."""
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder; {name_on_hub(path)}")


def open_folder(path: Path) -> Folder:
    """Opens a Hugging Face folder of one of FAMILIES, or OpenAI's GPT-2 release. Raises
    `BadInput` if it is none of these, if a file is missing or damaged, or if the architecture has a
    part that jaxgpt does not support."""
    check_folder(path)
    if (path / "hparams.json").is_file():
        file = TfCheckpoint(path)
        names = {_openai_name(name): (file, name) for name in file.shapes}
        hparams = read_json(path / "hparams.json", dict)
        hf = {OPENAI_FIELDS.get(name, name): value for name, value in hparams.items()}
        return _open(path, GPT2, hf, names)
    if not (path / "config.json").is_file():
        raise BadInput(f"{path} holds neither config.json (Hugging Face) nor hparams.json (OpenAI)")
    hf = read_json(path / "config.json", dict)
    family = FAMILIES.get(str(hf.get("model_type")))
    if family is None:
        kind = hf.get("model_type")
        latent = ": jaxgpt has no multi-head latent attention" if kind in LATENT else ""
        raise BadInput(
            f"{path}/config.json: model_type={kind!r} is not supported{latent}; only"
            f" {', '.join(FAMILIES)} are"
        )
    names: dict[str, tuple] = {}
    for file in _files(path):
        for name in file.shapes:
            short = family.own_name(name)
            if short in names:
                raise BadInput(f"{path} holds tensor {short} twice")
            if not short.endswith(family.ignored):
                names[short] = (file, name)
    for copy, original in family.copies.items():
        if copy in names:
            names.setdefault(original, names.pop(copy))
    skipped = tuple(sorted(name for name in names if name.startswith(family.skipped)))
    return _open(path, family, hf, {n: f for n, f in names.items() if n not in skipped}, skipped)


def say_skipped(folder: Folder) -> None:
    """Says which tensors of the folder are not read, if there are any."""
    if folder.skipped:
        say(f"skipped   {', '.join(folder.skipped)}: jaxgpt has no place for them")


def _open(path: Path, family: Family, hf: dict, names: dict[str, tuple], skipped=()) -> Folder:
    """Returns the folder if its config is possible and agrees with the tensors in its files."""
    claimed = largest = 0
    for name, (file, inner) in names.items():
        shape, dtype = file.shapes[inner], file.dtypes[inner]
        if dtype.name not in FLOATS:
            raise BadInput(f"{path}: tensor {name} holds {dtype}, no weights")
        claimed += math.prod(shape) * dtype.itemsize
        largest = max(largest, *shape) if math.prod(shape) else largest
    stored = sum(file.size for file in {file for file, _ in names.values()})
    if claimed > 2 * stored:  # a tied head may share the embedding's bytes
        raise BadInput(f"{path}: its tensors overlap: they take {claimed} bytes of {stored} stored")
    model = _model_config(path, family, hf, names)
    for field in SIZES:
        if getattr(model, field) > largest:
            raise BadInput(
                f"{path}: its config says {field}={getattr(model, field)}, but no tensor has more"
                f" than {largest} rows or columns"
            )
    layers = model.num_layers + model.encoder_layers
    if layers > len(names):
        raise BadInput(
            f"{path}: its config says {layers} layers, its files hold {len(names)} tensors"
        )
    if model.num_experts * len(model.mixture_layers) > len(names):
        raise BadInput(
            f"{path}: its config says {len(model.mixture_layers)} layers of {model.num_experts}"
            f" experts, its files hold {len(names)} tensors"
        )
    return Folder(path, family, model, names, skipped)


def _model_config(path: Path, family: Family, hf: dict, names: dict) -> ModelConfig:
    try:
        check_json(hf, family.schema)
        model = family.adapted(family.model_config(hf), names)
        for field in (*SIZES, *COUNTS):
            lowest = 0 if field in MAY_BE_0 else 1
            if not lowest <= getattr(model, field) < 1 << 31:
                raise ValueError(f"{field} is {getattr(model, field)}")
        model = validate(Config(model=model, objective=OBJECTIVES[model.kind])).model
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise BadInput(f"{path}: its config lacks or garbles a field: {e!r}") from e
    except BadInput as e:
        raise BadInput(f"{path}: its config is not a possible model: {e}") from e
    return model


def _files(path: Path) -> list:
    for name, reader in WEIGHTS:
        if (path / name).is_file():
            return [reader(path / name)]
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index, {"weight_map": dict})["weight_map"].values()
            shards = sorted({str(shard) for shard in shards})
            for shard in shards:
                if not re.fullmatch(r"[\w.-]+", shard) or shard.startswith("."):
                    raise BadInput(f"{index}: {shard!r} is not a file beside it; refused")
                if not (path / shard).is_file():
                    raise BadInput(f"{path / shard} is missing: {index.name} names it")
            return [reader(path / shard) for shard in shards]
    raise BadInput(f"{path} holds no weights: model.safetensors or pytorch_model.bin")


def _openai_name(name: str) -> str:
    """`model/h0/attn/c_attn/w` to `h.0.attn.c_attn.weight`."""
    parts = name.removeprefix("model/").split("/")
    if match := re.fullmatch(r"h(\d+)", parts[0]):
        parts[0:1] = ["h", match[1]]
    ends = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    return ".".join([*parts[:-1], ends.get(parts[-1], parts[-1])])
