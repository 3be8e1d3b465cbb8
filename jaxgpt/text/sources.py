"""`data.source` strings to documents."""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from jaxgpt.config import DataConfig
from jaxgpt.system.errors import BadInput
from jaxgpt.text.chat import read_chat
from jaxgpt.text.files import digest, expand, stamps
from jaxgpt.text.formats import (
    read_builtin,
    read_jsonl,
    read_parquet,
    read_text,
    read_tokens,
    read_warc,
)
from jaxgpt.text.pieces import Documents, num_bytes
from jaxgpt.text.tasks import TASKS, read_task
from jaxgpt.text.tfds import open_tfds

KINDS = (
    "builtin, text:GLOB, jsonl:GLOB, parquet:GLOB, warc:GLOB, tfds:NAME[/CONFIG], bin:GLOB,"
    " sft:GLOB, task:sentiment|entailment|questions:GLOB, shards:DIR or a mixture like"
    " 0.7*text:GLOB,0.3*jsonl:GLOB"
)
DIGESTS = "digests.json"
MIXED = r"\s*\d*\.?\d+\*"


@dataclasses.dataclass(frozen=True)
class Source:
    """One place that documents come from.

    `identity()` is a hash of all that the documents depend on. `validation` holds the documents
    that the source itself sets apart, where it does.
    """

    spec: str
    documents: Documents
    identity: Callable[[], str]
    weight: Fraction = Fraction(1)
    validation: "Source | None" = None
    num_bytes: int = 0  # of the files, for the progress bar; 0 = unknown
    masked: bool = False  # only parts of its documents are learnt
    files: tuple[str, ...] = ()  # that it reads


def open_sources(
    source: str, cfg: DataConfig, cache: Path, tokenizer: Any = None
) -> tuple[Source, ...]:
    """Returns the sources of a mixture, else the one source; weights add up to 1.

    `cfg` gives field, data_dir and chat_template. `tokenizer` is what `bin:` needs: its tokens are
    taken as they are.

    Raises:
      BadInput: now, if a source is unknown, no file matches or a library is missing; while
        reading, if a file is damaged or lacks the field (file and line are named).
    """
    if not re.match(MIXED, source):
        return (_open(source, cfg, cache, tokenizer),)
    parts = [part.strip() for part in re.split(rf",(?={MIXED})", source)]
    weighted = [part.partition("*")[::2] for part in parts]
    try:
        weights = [Fraction(weight) for weight, _ in weighted]
    except ValueError as e:  # thousands of digits
        raise BadInput(f"data source {source}: a weight is no number: {e}") from e
    if min(weights) <= 0:
        raise BadInput(f"data source {source}: weights must be above 0")
    opened = [_open(spec, cfg, cache, tokenizer) for _, spec in weighted]
    return tuple(
        dataclasses.replace(one, weight=weight / sum(weights))
        for one, weight in zip(opened, weights, strict=True)
    )


def _open(source: str, cfg: DataConfig, cache: Path, tokenizer) -> Source:
    kind, _, argument = source.partition(":")
    if source == "builtin":
        return Source(source, read_builtin, _hash_of_builtin)
    if kind == "tfds" and argument:
        return _open_tfds(source, argument, cfg.field, cache, cfg.data_dir)
    if kind == "bin" and argument and tokenizer is None:
        raise BadInput(
            f"data source {source} holds tokens: set data.tokenizer to the one that made them"
            " (gpt2:DIR, sentencepiece:FILE.model or byte)"
        )
    task, _, rows = argument.partition(":")
    if kind == "task" and task in TASKS and rows:
        reader = partial(read_task, task=task)
        return _from_files(source, kind, task, expand(source, rows), reader, cache, masked=True)
    readers = {
        "text": read_text,
        "jsonl": partial(read_jsonl, field=cfg.field),
        "parquet": partial(read_parquet, column=cfg.field),
        "warc": read_warc,
        "sft": partial(read_chat, template=cfg.chat_template),
    }
    if tokenizer is not None:
        readers["bin"] = partial(
            read_tokens, end_of_text=tokenizer.end_of_text, vocab_size=tokenizer.vocab_size
        )
    if kind not in readers or not argument:
        raise BadInput(f"data source {source!r} is unknown: choose {KINDS}")
    masked = kind == "sft"
    decides = cfg.chat_template if masked else cfg.field
    files = expand(source, argument)
    return _from_files(source, kind, decides, files, readers[kind], cache, masked)


def _from_files(source, kind, decides, files, read, cache: Path, masked: bool) -> Source:
    def identity() -> str:
        return f"{kind} {decides} {digest(files, cache / DIGESTS)}"

    sizes = (stamp[0] for stamp in stamps([file for file in files if "://" not in file]))
    return Source(
        source,
        partial(read, files),
        identity,
        num_bytes=sum(sizes),
        masked=masked,
        files=tuple(files),
    )


def _open_tfds(source: str, name: str, field: str, cache: Path, data_dir: str) -> Source:
    train, held_out = open_tfds(name, field, data_dir)

    def of(split) -> Source:
        def identity() -> str:
            return f"tfds {field} {digest(split.files(), cache / DIGESTS)}"

        return Source(source, split, identity, files=tuple(split.files()))

    return dataclasses.replace(of(train), validation=held_out and of(held_out))


def _hash_of_builtin() -> str:
    found = hashlib.sha256()
    for piece in read_builtin():
        found.update(num_bytes(piece.text).to_bytes(8, "little") + piece.text.encode())
    return found.hexdigest()
