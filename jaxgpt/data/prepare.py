"""Text to token shards, cached under a hash of everything that they depend on."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxgpt.config import DataConfig
from jaxgpt.data import shards
from jaxgpt.data.cache import load_or_write
from jaxgpt.data.remote import fetch, publish
from jaxgpt.data.shards import Split, read_splits
from jaxgpt.data.split import hold_out, measure
from jaxgpt.data.tokenize import write_splits
from jaxgpt.metrics.progress import Bar, elapsed
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged, path_of, read_json
from jaxgpt.system.stores import is_object_store
from jaxgpt.text.cleaning import Report, clean_documents, cleaning_identity, make_steps
from jaxgpt.text.files import file_stamp, is_young
from jaxgpt.text.pieces import Documents, Piece, num_bytes
from jaxgpt.text.sources import Source, nearest, open_sources
from jaxgpt.tokenizer import Tokenizer, load_tokenizer, make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.base import TrainingText
from jaxgpt.tokenizer.load import check_spec, describes, fingerprint, is_trained


@runtime_checkable
class Data(Protocol):
    """What a run knows of any data; see `Prepared` and `labelled.prepare.PreparedRows`."""

    folder: Path
    tokenizer: Tokenizer
    dropped: dict[str, dict]
    masked: dict[str, dict]

    @property
    def fingerprint(self) -> str:
        """Differs if a batch does."""

    @property
    def counts(self) -> dict[str, int]:
        """How much there is of it: `documents`, `tokens`, `bytes`."""

    @property
    def summary(self) -> dict:
        """Its sizes, as JSON."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A corpus ready to train on."""

    folder: Path
    train: Split
    validation: Split
    tokenizer: Tokenizer
    dropped: dict[str, dict]  # by cleaning: {rule: {"documents", "examples"}}
    masked: dict[str, dict]  # by cleaning: {kind: {"masks", "documents", "examples"}}

    @property
    def fingerprint(self) -> str:
        """A hash of both token streams: equal fingerprints, equal batches."""
        text = f"{self.train.digest} {self.validation.digest}"
        weights = [str(part.weight) for part in self.train.parts]
        text += f" {weights}" if len(weights) > 1 else ""
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """How much there is of it, over both splits."""
        splits = self.train, self.validation
        return {
            "documents": sum(split.documents for split in splits),
            "tokens": sum(len(split.tokens) for split in splits),
            "bytes": sum(split.bytes for split in splits),
        }

    def __str__(self) -> str:
        train, validation = len(self.train.tokens), len(self.validation.tokens)
        return f"{train:,} train and {validation:,} validation tokens"

    @property
    def summary(self) -> dict:
        """Its sizes, and what cleaning did, as JSON."""
        summary = {}
        for split in (self.train, self.validation):
            summary[f"{split.name} documents"] = split.documents
            summary[f"{split.name} tokens"] = len(split.tokens)
            summary[f"{split.name} bytes"] = split.bytes
        summary["vocabulary"] = self.tokenizer.vocab_size
        if len(self.train.parts) > 1:
            summary["sources"] = {
                part.source: {
                    "weight": float(part.weight),
                    "train documents": part.documents,
                    "train tokens": part.end - part.first,
                }
                for part in self.train.parts
            }
        if self.dropped:
            summary["dropped"] = {rule: entry["documents"] for rule, entry in self.dropped.items()}
        if self.masked:
            summary["masked"] = {kind: entry["masks"] for kind, entry in self.masked.items()}
        return summary


def cache_folder(cfg: DataConfig) -> Path:
    """Returns where prepared corpora are cached."""
    folder = cfg.cache_dir or os.environ.get("JAXGPT_CACHE") or "~/.cache/jaxgpt"
    return path_of(folder, "data.cache_dir")


def prepare(cfg: DataConfig, out: str = "") -> Prepared:
    """Returns the corpus of `cfg` as token shards, written now if the cache has none.

    The cache key covers all that decides on the tokens: the text, the split rule, the cleaning and
    the tokenizer. `out` names a folder to write to instead of the cache, or a URL to copy it to.

    Raises:
      BadInput: for a source, file, line, step or tokenizer that cannot be used.
    """
    cache = cache_folder(cfg)
    if cfg.source.startswith("shards:"):
        folder = cfg.source.removeprefix("shards:")
        if is_object_store(folder):
            return fetch(folder, cache, read_prepared)
        return open_prepared(path_of(folder, "data.source=shards"))
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"data.cache_dir {cache} cannot be made: {e}") from e
    tokenizer, sources, validation = find_data(cfg, cache)
    _ask_about_kinds((*sources, *validation))

    def make_key() -> str:
        return hash_of(
            str(shards.FORMAT),
            *[f"{s.weight} {_identity(s)}" for s in sources],
            *[f"validation {s.identity()}" for s in validation],
            "" if validation else str(cfg.validation_fraction),
            cleaning_identity(cfg.clean) if cfg.clean else "",
            f"{cfg.tokenizer} sentencepiece {version('sentencepiece')} {cfg.special_tokens}"
            if tokenizer is None
            else fingerprint(tokenizer),
        )

    key = CacheKey((*sources, *validation), make_key)

    write = partial(_write_corpus, cfg, sources, validation, tokenizer, key)
    to_cache = not out or is_object_store(out)
    folder = cache / key.value if to_cache else out_folder(out, key.value)
    if not to_cache and folder.exists():
        return open_prepared(folder)
    prepared = load_or_write(folder, cache / "locks", write, read_prepared)
    if is_object_store(out):
        publish(folder, out)
    return prepared


def check_data(cfg: DataConfig) -> None:
    """Raises `BadInput` for a source, tokenizer or cleaning step that cannot be used, as `prepare`
    would; reads no document."""
    if not cfg.source.startswith("shards:"):
        find_data(cfg, cache_folder(cfg))


def find_data(
    cfg: DataConfig, cache: Path
) -> tuple[Tokenizer | None, tuple[Source, ...], tuple[Source, ...]]:
    """Returns the tokenizer, None if it is to be trained, and the sources of `data.source` and
    `data.validation_source`; reads no document yet. Raises `BadInput` for a tokenizer, cleaning
    step or source that cannot be used, or without files."""
    check_spec(cfg.tokenizer)
    make_steps(cfg.clean)  # for its errors
    tokenizer = None
    if not is_trained(cfg.tokenizer):
        tokenizer = make_tokenizer(cfg.tokenizer, special_tokens=cfg.special_tokens)
    sources = open_sources(cfg.source, cfg, cache, tokenizer)
    if not cfg.validation_source:
        return tokenizer, sources, ()
    return tokenizer, sources, open_sources(cfg.validation_source, cfg, cache, tokenizer)


def _ask_about_kinds(sources: tuple[Source, ...]) -> None:
    """Asks whether another kind of source was meant, where a file's ending says so."""
    for source in sources:
        if meant := nearest(source.spec):
            say(f"data      {source.spec} is read as plain text; did you mean {meant}?")


class CacheKey:
    """The cache key of a corpus, and a check that its files are still those it was made from."""

    def __init__(self, sources: tuple[Source, ...], make_key: Callable[[], str]):
        sources = [*sources, *(s.validation for s in sources if s.validation)]
        files = sorted({file for source in sources for file in source.files})
        self.make_key, self.stamps = make_key, {file: file_stamp(file) for file in files}
        self.is_young = any(map(is_young, self.stamps.values()))
        self.value = make_key()

    def check(self) -> None:
        """Raises `BadInput` if a file was written to or replaced since it was hashed."""
        for file, stamp in self.stamps.items():
            if file_stamp(file) != stamp:
                raise BadInput(f"{file} changed while it was read; run the command again")
        if self.is_young and self.make_key() != self.value:
            raise BadInput("the text changed while it was read; run the command again")


def out_folder(out: str, key: str) -> Path:
    """Returns the folder that --out names, which is not there (an empty one is removed) or holds
    this corpus."""
    folder = path_of(out, "--out")
    if folder.name in ("", ".."):  # ., / and the like
        folder = folder.resolve()
    if (folder / shards.META).exists():
        if read_json(folder / shards.META, {"key": str})["key"] != key:
            raise BadInput(f"{folder} already holds another prepared corpus; choose another --out")
    elif folder.exists():
        if not folder.is_dir() or folder.samefile(".") or any(folder.iterdir()):
            raise BadInput(f"{folder} exists and is no prepared corpus; choose another --out")
        folder.rmdir()
    return folder


def read_prepared(folder: Path) -> Prepared:
    """Returns what `prepare` wrote into `folder`."""
    meta, (train, validation) = read_splits(folder, "train", "validation")
    tokenizer = load_tokenizer(folder / "tokenizer")
    return Prepared(folder, train, validation, tokenizer, meta["dropped"], meta.get("masked", {}))


def open_prepared(folder: Path) -> Prepared:
    """Returns what `prepare` wrote into a folder that the user named; errors say what to do."""
    try:
        return read_prepared(folder)
    except Damaged as e:
        raise BadInput(f"{e}; delete {folder} and prepare again") from e


def check_shards(cfg: DataConfig, data: Data) -> None:
    """Compares `data.tokenizer` with the tokenizer that comes with `shards:`.

    Says so if the shards' tokenizer is used instead of the default one.

    Raises:
      BadInput: if the field names another one.
    """
    if not cfg.source.startswith("shards:") or describes(
        cfg.tokenizer, cfg.special_tokens, data.tokenizer
    ):
        return
    stored = f"{data.tokenizer.kind} of {data.tokenizer.vocab_size:,} ids"
    if (cfg.tokenizer, cfg.special_tokens) != (DataConfig.tokenizer, DataConfig.special_tokens):
        more = f" with data.special_tokens={cfg.special_tokens}" if cfg.special_tokens else ""
        raise BadInput(
            f"data.tokenizer={cfg.tokenizer}{more} is not the tokenizer that {cfg.source} was"
            f" prepared with ({stored}); leave the field out, or prepare the text again with yours"
        )
    say(f"data      the tokenizer is that of {cfg.source}: {stored}")


def prepare_whole(source: str, cfg: DataConfig, tokenizer: Tokenizer, cache: Path) -> Split:
    """Returns the whole of `source` as one split, for evaluation with a trained tokenizer."""
    if source.startswith("shards:"):
        raise BadInput("--data=shards:DIR holds splits already; name the text instead")
    sources = open_sources(source, cfg, cache, tokenizer)
    _ask_about_kinds(sources)

    def make_key() -> str:
        identities = [source.identity() for source in sources]
        return hash_of(str(shards.FORMAT), *identities, "whole", fingerprint(tokenizer))

    key = CacheKey(sources, make_key)

    def write(scratch: Path) -> None:
        splits = {"whole": [_with_size(source) for source in sources]}
        _write_shards(scratch, splits, tokenizer, key, Report())

    def read(folder: Path) -> Split:
        return read_splits(folder, "whole")[1][0]

    return load_or_write(cache / key.value, cache / "locks", write, read)


def _write_corpus(
    cfg: DataConfig,
    sources: tuple[Source, ...],
    validation: tuple[Source, ...],
    tokenizer: Tokenizer | None,
    key: CacheKey,
    scratch: Path,
) -> None:
    """Cleans, splits and tokenizes; writes everything into the folder `scratch`."""
    report, steps = Report(), make_steps(cfg.clean)
    clean = partial(_clean, steps=steps, report=report, scratch=scratch)
    cleaned = [clean(source) for source in sources]
    own = [source.validation and clean(source.validation) for source in sources]
    splits = {"train": [], "validation": [_with_size(clean(source)) for source in validation]}
    for source, own_validation in zip(cleaned, own, strict=True):
        sizes = measure(source.documents, source.spec)
        if validation or own_validation:
            splits["train"].append(replace(source, num_bytes=sizes.total))
            if not validation:
                splits["validation"].append(_with_size(own_validation))
        elif sizes.total < 2:
            raise BadInput(f"data source {source.spec} is too short to hold out a validation part")
        else:
            parts = hold_out(source.documents, sizes, cfg.validation_fraction)
            for split, (documents, size) in zip(splits.values(), parts, strict=True):
                split.append(replace(source, documents=documents, num_bytes=size))
    total = sum(source.num_bytes for split in splits.values() for source in split)
    say(f"data      preparing {cfg.source}: {total / 1e6:,.1f} MB")
    if tokenizer is None:
        say(f"data      training {cfg.tokenizer} on the training part")
        texts = [
            TrainingText(partial(_texts, s.documents), s.num_bytes, float(s.weight))
            for s in splits["train"]
        ]
        with elapsed(f"data      training {cfg.tokenizer}:"):
            tokenizer = make_tokenizer(cfg.tokenizer, texts, cfg.special_tokens)
    _write_shards(scratch, splits, tokenizer, key, report)


def _with_size(source: Source) -> Source:
    return replace(source, num_bytes=measure(source.documents, source.spec).total)


def _clean(source: Source, steps: list, report: Report, scratch: Path) -> Source:
    """Returns the source with its documents cleaned, which are spooled to disk.

    The steps remember earlier documents, so duplicates are found across sources and splits.
    """
    if not steps:
        return source
    spool = scratch / f"{len(list(scratch.glob('*.spool')))}.spool"
    with (
        open(spool, "w") as file,
        Bar(f"data      cleaning {source.spec}:", source.num_bytes) as bar,
    ):
        for piece in clean_documents(_plain_pieces(source.documents, bar), steps, report):
            file.write(json.dumps([piece.text, piece.file, piece.row]) + "\n")
    if not spool.stat().st_size:
        counts = ", ".join(f"{rule} {e['documents']}" for rule, e in report.dropped.items())
        raise BadInput(
            f"data.clean drops every document of {source.spec} ({counts or 'it has none'})"
        )
    return replace(source, documents=partial(_read_spool, spool))


def _plain_pieces(documents: Documents, bar: Bar) -> Iterator[Piece]:
    for piece in documents():
        if piece.tokens is not None or piece.spans:
            raise BadInput("data.clean cleans text, not bin:, sft: or task:; set it to nothing")
        bar.advance(num_bytes(piece.text))
        yield piece


def _read_spool(spool: Path) -> Iterator[Piece]:
    with open(spool) as file:
        for line in file:
            yield Piece(*json.loads(line))


def _texts(documents: Documents) -> Iterator[str]:
    return (piece.text for piece in documents())


def _write_shards(
    scratch: Path,
    splits: dict[str, list[Source]],
    tokenizer: Tokenizer,
    key: CacheKey,
    report: Report,
) -> None:
    """Writes the tokenizer, the tokens of each split, and meta.json."""
    save_tokenizer(tokenizer, scratch / "tokenizer")
    entries, files = write_splits(scratch, splits, tokenizer)
    key.check()
    for spool in scratch.glob("*.spool"):
        spool.unlink()
    meta = {
        "dtype": shards.token_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "key": key.value,
        "files": files,
        "dropped": report.dropped,
        "masked": report.masked,
        "splits": entries,
    }
    shards.write_meta(scratch, meta)


def _identity(source: Source) -> str:
    own = f" {source.validation.identity()}" if source.validation else ""
    return source.identity() + own


def hash_of(*parts: str) -> str:
    """Returns a hash of some texts and their order."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
