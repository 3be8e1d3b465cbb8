"""`data.source` strings to documents."""

import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path

from jaxgpt.config import DataConfig
from jaxgpt.hub.datasets import dataset_files
from jaxgpt.system.errors import BadInput
from jaxgpt.text import formats
from jaxgpt.text.chat import ChatReader, kind_of
from jaxgpt.text.files import file_stamp, hash_files, list_files
from jaxgpt.text.pieces import Documents, Piece, num_bytes
from jaxgpt.text.tasks import TASKS, read_task
from jaxgpt.text.tfds import open_tfds
from jaxgpt.tokenizer import Tokenizer

KINDS = (
    "builtin, text:GLOB, jsonl:GLOB, parquet:GLOB, warc:GLOB, tfds:NAME[/CONFIG], bin:GLOB,"
    " sft:GLOB, task:sentiment|entailment|questions:GLOB, hf:ORG/NAME, shards:DIR or a mixture like"
    " 0.7*text:GLOB,0.3*jsonl:GLOB"
)
FILE_HASHES = "digests.json"  # in the cache; see `hash_files`
NAMES = ("text", "jsonl", "parquet", "warc", "tfds", "bin", "sft", "task", "hf", "shards")
KIND_OF = {  # what a file's ending says
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".warc": "warc",
    ".wet": "warc",
    ".bin": "bin",
}
WEIGHT = r"\s*\d*\.?\d+\*"


@dataclasses.dataclass(frozen=True)
class Source:
    """The documents of one source.

    `identity()` is a hash of all that the documents depend on. `validation` is the source's own
    validation split, where it has one.
    """

    spec: str
    documents: Documents
    identity: Callable[[], str]
    weight: Fraction = Fraction(1)
    validation: "Source | None" = None
    num_bytes: int = 0  # of its text, or of its files as long as that is not known; 0 = unknown
    masked: bool = False  # only parts of its documents are targets of the loss
    files: tuple[str, ...] = ()


def open_sources(
    source: str,
    cfg: DataConfig,
    cache: Path,
    tokenizer: Tokenizer | None = None,
    open_one: Callable[..., Source] | None = None,
) -> tuple[Source, ...]:
    """Returns the sources of a mixture, else the one source; weights add up to 1.

    `cfg` gives field, data_dir and chat_template. `tokenizer` is the one that made the tokens of
    `bin:` files, which are not tokenized again. `open_one` opens each of them (default: as text).

    Raises:
      BadInput: now, if a source is unknown, no file matches or a library is missing; while
        reading, if a file is damaged or lacks the field (file and line are named).
    """
    open_one = open_one or _open
    if not re.match(WEIGHT, source):
        return (open_one(source, cfg, cache, tokenizer),)
    terms = [term.strip().partition("*") for term in re.split(rf",(?={WEIGHT})", source)]
    try:
        weights = [Fraction(weight) for weight, _, _ in terms]
    except ValueError as e:  # thousands of digits
        raise BadInput(f"data source {source}: a weight is no number: {e}") from e
    if min(weights) <= 0:
        raise BadInput(f"data source {source}: weights must be above 0")
    sources = [open_one(spec, cfg, cache, tokenizer) for _, _, spec in terms]
    return tuple(
        dataclasses.replace(opened, weight=weight / sum(weights))
        for opened, weight in zip(sources, weights, strict=True)
    )


def _open(spec: str, cfg: DataConfig, cache: Path, tokenizer: Tokenizer | None) -> Source:
    kind, _, argument = spec.partition(":")
    if spec == "builtin":
        return Source(spec, formats.read_builtin, _hash_of_builtin)
    if kind == "tfds" and argument:
        train, *validation = (
            file_source(spec, f"tfds {cfg.field}", documents, files, cache)
            for documents, files in open_tfds(argument, cfg.field, cfg.data_dir)
        )
        return dataclasses.replace(train, validation=validation[0] if validation else None)
    if kind == "bin" and argument and tokenizer is None:
        raise BadInput(
            f"data source {spec} holds tokens: set data.tokenizer to the one that made them"
            " (gpt2:DIR, sentencepiece:FILE.model or byte)"
        )
    setting = cfg.chat_template if kind == "sft" else cfg.field
    readers = {
        "text": formats.read_text,
        "jsonl": partial(formats.read_jsonl, field=cfg.field),
        "parquet": partial(formats.read_parquet, column=cfg.field),
        "warc": formats.read_warc,
        "sft": ChatReader(spec, cfg.chat_template),
        "hf": partial(formats.read_any, field=cfg.field),
    }
    if tokenizer is not None:
        readers["bin"] = partial(
            formats.read_tokens, end_of_text=tokenizer.end_of_text, vocab_size=tokenizer.vocab_size
        )
    task, _, task_pattern = argument.partition(":")
    if kind == "task" and task in TASKS and task_pattern:
        readers["task"] = partial(read_task, task=task)
        setting, argument = task, task_pattern
    if kind not in readers or not argument:
        hint = f"; did you mean {meant}?" if (meant := nearest(spec)) else f": choose {KINDS}"
        raise BadInput(f"data source {spec!r} is unknown{hint}")
    is_configured = spec in cfg.source  # and not one that a flag of `evaluate` names
    remedy = f"; name yours with --config.data.source={kind}:FILE" if is_configured else ""
    if kind == "hf" or argument.startswith("hf:"):
        splits = dataset_files(argument.removeprefix("hf:"), cache)
    else:
        splits = (list_files(spec, argument, remedy), [])
    masked = kind in ("sft", "task")

    def part(files: list[str]) -> Source:
        documents = partial(_documents, readers[kind], files)
        return file_source(spec, f"{kind} {setting}", documents, files, cache, masked)

    train, validation = splits
    return dataclasses.replace(part(train), validation=part(validation) if validation else None)


def _documents(read: Callable[[str], Iterator[Piece]], files: list[str]) -> Iterator[Piece]:
    return chain.from_iterable(map(read, files))


def nearest(spec: str) -> str:
    """Returns the source that was probably meant: `jsonl:a.jsonl` for `a.jsonl`, which is none,
    or for `text:a.jsonl`, which is one; '' where nothing suggests another."""
    kind, colon, pattern = spec.partition(":")
    if colon and kind != "text" and not pattern.startswith("//"):
        close = difflib.get_close_matches(kind, NAMES, n=1, cutoff=0.7)
        return f"{close[0]}:{pattern}" if close and kind not in NAMES and pattern else ""
    path = pattern if colon and kind == "text" else spec
    ending = Path(path.removesuffix(".gz").removesuffix(".zst")).suffix
    if not (ending or "/" in path or os.path.exists(path)):
        return ""
    meant = f"{kind_of_file(path, ending)}:{path}"
    return meant if meant != spec else ""


def kind_of_file(path: str, ending: str) -> str:
    """Returns the kind of source that a file of this ending probably is: `sft` if its first row of
    JSON is one of prompts and responses."""
    kind = KIND_OF.get(ending, "text")
    if kind == "jsonl" and os.path.isfile(path):
        with suppress(BadInput, StopIteration):  # neither, or damaged, or empty
            where, _, row = next(formats.json_rows([path]))
            kind_of(row, where)
            return "sft"
    return kind


def file_source(
    spec: str, settings: str, documents: Documents, files: list[str], cache: Path, masked=False
) -> Source:
    """Returns the source of some files, which are read by `documents` with `settings`."""
    return Source(
        spec,
        documents,
        identity=lambda: f"{settings} {hash_files(files, cache / FILE_HASHES)}",
        num_bytes=sum(file_stamp(file)[0] for file in files if "://" not in file),
        masked=masked,
        files=tuple(files),
    )


def _hash_of_builtin() -> str:
    text_hash = hashlib.sha256()
    for piece in formats.read_builtin():
        text_hash.update(num_bytes(piece.text).to_bytes(8, "little") + piece.text.encode())
    return text_hash.hexdigest()
