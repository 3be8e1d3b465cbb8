"""What a run takes from `init_from`, a workdir or a model folder (also one of the hub), before its
weights: the architecture and the tokenizer that its config leaves open. A student may take its
teacher's.

    Config(init_from=DIR, model=presets.from_init(), data=DataConfig(tokenizer=""))
"""

import copy
import dataclasses
from pathlib import Path

from etils import epath

from jaxgpt.config import Config, ModelConfig
from jaxgpt.config.schema import get_field, left_open, model_differences, set_field
from jaxgpt.config.stored import methods_done, read_config
from jaxgpt.config.validate import (
    EVERY_SECOND,
    changed,
    check_fields,
    parse_layers,
    parse_patterns,
    validate,
)
from jaxgpt.hub.models import located
from jaxgpt.interchange.folder import is_model_folder, name_on_hub, open_folder
from jaxgpt.interchange.tokenizers import read_tokenizer
from jaxgpt.interchange.upcycling import FIELDS, check_upcycling, is_upcycled
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

CONTEXT = 1024  # TRL's default, where the model has a longer one: Llama 3.2's takes 131,072


def is_workdir(path: str) -> bool:
    """Says whether `path` is a run's folder, with checkpoints."""
    return (epath.Path(located(path)) / "checkpoints").exists()


def check_source(path: str, field: str = "init_from") -> None:
    """Raises `BadInput` if there is nothing at `path` to start from."""
    if not is_workdir(path) and not is_model_folder(Path(located(path))):
        raise BadInput(
            f"{field}={path} is neither a workdir with checkpoints"
            f" nor a Hugging Face model folder; {name_on_hub(Path(path))}"
        )


def model_of(path: str) -> ModelConfig:
    """Returns the architecture of a workdir or a model folder, its sizes filled in."""
    path = located(path)
    return (
        read_config(epath.Path(path)).model if is_workdir(path) else open_folder(Path(path)).model
    )


def chosen_layers(config: Config, count: int) -> list[int]:
    """Returns which of the `count` layers at `init_from` become the model's, ascending: all without
    `init_layers`. Raises `BadInput` if it names one that is not there, or one twice."""
    if config.init_layers == EVERY_SECOND:
        return list(range(0, count, 2))
    if not config.init_layers:
        return list(range(count))
    layers = parse_layers(config.init_layers)
    if layers[-1] >= count:
        raise BadInput(
            f"init_layers={config.init_layers}: init_from={config.init_from} has {count} layers,"
            f" numbered from 0 to {count - 1}"
        )
    return layers


def _taken(config: Config) -> ModelConfig:
    """Returns the architecture at `init_from`, of the layers that are taken. Raises `BadInput` if
    one would come to stand where the model has another window or feed-forward."""
    theirs = model_of(config.init_from)
    layers, every = chosen_layers(config, theirs.num_layers), theirs.full_attention_every
    if every and any(layer % every != place % every for place, layer in enumerate(layers)):
        raise BadInput(
            f"init_layers={config.init_layers}: in init_from={config.init_from} every"
            f" {every}th layer attends to all; choose layers that keep that order"
        )
    taken = dataclasses.replace(theirs, num_layers=len(layers))
    there, here = theirs.mixture_layers, taken.mixture_layers
    if any((layer in there) != (place in here) for place, layer in enumerate(layers)):
        raise BadInput(
            f"init_layers={config.init_layers}: in init_from={config.init_from} layers"
            f" {', '.join(map(str, there))} are mixtures; choose layers that keep that order"
        )
    return taken


def tokenizer_of(path: str) -> Tokenizer | None:
    """Returns the tokenizer of a workdir or a model folder, None if it has none."""
    path = located(path)
    if is_workdir(path):
        return load_tokenizer(epath.Path(path) / "tokenizer")
    files = ("tokenizer.json", "vocab.json", "encoder.json", "vocab.txt", "spiece.model")
    return read_tokenizer(Path(path)) if any((Path(path) / f).exists() for f in files) else None


def completed(config: Config) -> Config:
    """Returns a checked copy (see `validate`) in which what was left open is that of `init_from`,
    or of the teacher where only that is given: the fields of the model that are None and the
    tokenizer that is "".

    Dropout is 0 and the context at most `CONTEXT` unless they are given. The vocabulary is that of
    the model there, with the rows of further special tokens.

    Raises:
      BadInput: if there is neither, or what is given is not as it is at `init_from`.
    """
    opened, config = left_open(config), copy.deepcopy(config)
    if not opened:
        return _as_stored(_inheriting(validate(config)))
    for path in opened:
        set_field(config, path, get_field(Config(), path))
    check_fields(config)  # before any file is read
    source, field = config.init_from, "init_from"
    if config.objective == "distill" and not source:
        source, field = config.objectives.distill.teacher, "objectives.distill.teacher"
    if not source:
        raise BadInput(
            f"--config.{field}=DIR is missing: a workdir or a Hugging Face folder, which has the"
            f" {opened[0].partition('.')[0] if len(opened) > 1 else 'tokenizer'} of this config"
        )
    check_source(source, field)
    theirs = _taken(config) if config.init_from else model_of(source)
    vocab_size = 0  # 0: that of the tokenizer that is given
    if "data.tokenizer" in opened:
        config.data.tokenizer = tokenizer_spec(source)
        tokenizer = make_tokenizer(config.data.tokenizer, (), config.data.special_tokens)
        vocab_size = max(theirs.vocab_size, tokenizer.vocab_size)
    context = min(theirs.max_seq_len, CONTEXT)
    chosen = dict(vocab_size=vocab_size, max_seq_len=context, dropout=ModelConfig.dropout)
    chosen["max_source_len"] = min(theirs.max_source_len, CONTEXT)
    for name, value in (vars(theirs) | chosen).items():
        if f"model.{name}" in opened:
            setattr(config.model, name, value)
    config = _as_stored(_inheriting(validate(config)))
    if config.init_from:
        check_model(config)
    return config


def _inheriting(config: Config) -> Config:
    """Returns a checked config that goes on where `shrink` left the weights to start from: what was
    done, the ranks of factors and cores and, where weights were pruned and `shrink.zeros` is auto,
    the zeros."""
    if not config.init_from or not is_workdir(config.init_from):
        return config
    source = read_config(epath.Path(config.init_from))
    mine, theirs = config.shrink, source.shrink
    is_pruned = theirs.zeros == "keep" or theirs.sparsity > 0
    values = {
        "shrink.done": mine.done or methods_done(source),
        "shrink.ranks": mine.ranks or theirs.ranks,
        "shrink.tensor_train": mine.tensor_train or theirs.tensor_train,
        "shrink.zeros": "keep" if mine.zeros == "auto" and is_pruned else mine.zeros,
    }
    return changed(config, values)


def tokenizer_spec(path: str) -> str:
    """Returns the `data.tokenizer` that names the tokenizer of a workdir or a model folder."""
    if is_workdir(path):
        return f"hf:{path}"
    if (tokenizer := tokenizer_of(path)) is None:
        raise BadInput(
            f"init_from={path} holds no tokenizer: set data.tokenizer to the one it knows"
        )
    return f"{tokenizer.kind}:{path}"


def _as_stored(config: Config) -> Config:
    """Returns `config` with the weights stored as at `init_from`, where LoRA trains additions to
    them and leaves them as they are (QLoRA, arXiv:2305.14314)."""
    if config.lora.rank and config.init_from and is_workdir(config.init_from):
        theirs = read_config(epath.Path(located(config.init_from))).shrink
        form = ("weights", "group", "keep") if theirs.weights != "float" else ()
        config = changed(config, {f"shrink.{name}": getattr(theirs, name) for name in form})
    return config


def _check_trainable(config: Config) -> None:
    path = config.init_from
    stored = read_config(epath.Path(path)).shrink.weights if is_workdir(path) else "float"
    if stored != "float" and not config.lora.rank:
        raise BadInput(
            f"init_from={path} holds {stored} weights, which are not trained: set lora.rank to"
            " train additions to them, or start from the run that they were made of"
        )


def check_model(config: Config) -> None:
    """Raises `BadInput` if the model at `init_from` is another than the config's, or quantised
    where its weights would be trained."""
    _check_trainable(config)
    path, mine, taken = config.init_from, config.model, config.init_layers
    theirs, fresh = _taken(config), parse_patterns(config.init_fresh, "init_fresh")
    differing = model_differences(theirs, mine)
    if is_upcycled(theirs, mine):
        differing = [name for name in differing if name not in FIELDS]
    rope = [name for name in differing if name.startswith("rope_")]
    if any(pattern.search("rope") for pattern in fresh):
        differing = [name for name in differing if name not in rope]
    if mine.tie_embeddings and not theirs.tie_embeddings:
        if not any(pattern.search("head") for pattern in fresh):  # it would be left over
            differing.append("tie_embeddings")
    if differing:
        hint = "; leave these fields out to take those that are there, as configs/finetune.py does"
        if differing == rope:
            hint = "; name rope in init_fresh to change it"
        if differing == ["num_layers"] and not taken:
            hint += f"; or name the layers to take in init_layers, for example {EVERY_SECOND}"
        differences = (
            f"model.{name}: {getattr(theirs, name)!r} there, {getattr(mine, name)!r} here"
            for name in differing
        )
        what = f"{path} with init_layers={taken}" if taken else path
        raise BadInput(f"init_from={what} is another model: {'; '.join(differences)}{hint}")
    if is_upcycled(theirs, mine):
        check_upcycling(path, theirs, mine)
    for field in ("max_seq_len", "max_source_len"):
        there, here = getattr(theirs, field), getattr(mine, field)
        if mine.position == "learned" and here > there:
            raise BadInput(f"init_from={path} has {there} positions, model.{field}={here}")
