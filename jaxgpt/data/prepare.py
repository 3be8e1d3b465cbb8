"""Text to token shards, cached under a hash of everything that they depend on."""

import dataclasses
import hashlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

from jaxgpt.config import BadInput, DataConfig
from jaxgpt.config.cli import say
from jaxgpt.data.shards import (
    META,
    Split,
    read_meta,
    read_split,
    whole_or_nothing,
    write_meta,
    write_split,
)
from jaxgpt.data.sources import open_source
from jaxgpt.data.split import hold_out, scan
from jaxgpt.tokenizer import Tokenizer, load_tokenizer, make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.load import check_spec, fingerprint, is_trained


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A corpus ready to train on."""

    folder: Path
    train: Split
    validation: Split
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        """A hash of both token streams: equal fingerprints, equal batches."""
        return hashlib.blake2b(
            f"{self.train.blake2b} {self.validation.blake2b}".encode(), digest_size=16
        ).hexdigest()


def cache_folder(cfg: DataConfig) -> Path:
    """Returns where prepared corpora live."""
    chosen = cfg.cache_dir or os.environ.get("JAXGPT_CACHE") or "~/.cache/jaxgpt"
    return Path(chosen).expanduser()


def prepare(cfg: DataConfig, out: str = "") -> Prepared:
    """Returns the corpus of `cfg` as token shards, written now if the cache has none.

    Everything is in the key that decides: the text, the split rule and the tokenizer. `out`
    names a folder to write to instead of the cache.

    Raises:
      BadInput: for a source, file, line or tokenizer that cannot be used.
    """
    if cfg.source.startswith("shards:"):
        return open_prepared(Path(cfg.source.removeprefix("shards:")).expanduser())
    check_spec(cfg.tokenizer)
    documents = open_source(cfg.source, cfg.field)
    held_out = cfg.validation_source and open_source(cfg.validation_source, cfg.field)
    found = scan(documents, cfg.source)
    if held_out:
        train, validation = documents, held_out
        rule = scan(held_out, cfg.validation_source).digest
    else:
        if sum(found.sizes) < 2:
            raise BadInput(f"data source {cfg.source} is too short to hold out a validation part")
        train, validation = hold_out(documents, found.sizes, cfg.validation_fraction)
        rule = str(cfg.validation_fraction)
    key = _hash(found.digest, rule, _tokenizer_identity(cfg.tokenizer))
    folder = Path(out) if out else cache_folder(cfg) / key
    if (folder / META).exists():
        if read_meta(folder)["key"] != key:
            raise BadInput(f"{folder} already holds another prepared corpus; choose another --out")
        return open_prepared(folder)
    total = sum(found.sizes)
    say(f"data      preparing {cfg.source}: {len(found.sizes):,} documents, {total / 1e6:,.1f} MB")
    with whole_or_nothing(folder) as scratch:
        if is_trained(cfg.tokenizer):
            say(f"data      training {cfg.tokenizer} on the training part")
        tokenizer = make_tokenizer(cfg.tokenizer, train, total)
        save_tokenizer(tokenizer, scratch / "tokenizer")
        splits = {
            name: write_split(scratch, name, part, tokenizer)
            for name, part in (("train", train), ("validation", validation))
        }
        write_meta(scratch, tokenizer.vocab_size, key, splits)
    return open_prepared(folder)


def open_prepared(folder: Path) -> Prepared:
    """Returns what `prepare` wrote into `folder`.

    Raises:
      BadInput: if it is not there or damaged.
    """
    train, validation = read_split(folder, "train"), read_split(folder, "validation")
    return Prepared(folder, train, validation, load_tokenizer(folder / "tokenizer"))


def prepare_whole(source: str, field: str, tokenizer: Tokenizer, cache: Path) -> Split:
    """Returns the whole of `source` as one split, for evaluation with a trained tokenizer.

    Raises:
      BadInput: see `open_source`.
    """
    documents = open_source(source, field)
    with tempfile.TemporaryDirectory() as scratch:
        identity = fingerprint(tokenizer, Path(scratch))
    key = _hash(scan(documents, source).digest, "whole", identity)
    folder = cache / key
    if not (folder / META).exists():
        with whole_or_nothing(folder) as scratch:
            splits = {"whole": write_split(scratch, "whole", documents, tokenizer)}
            write_meta(scratch, tokenizer.vocab_size, key, splits)
    return read_split(folder, "whole")


def _tokenizer_identity(spec: str) -> str:
    if is_trained(spec):
        return f"{spec} sentencepiece {version('sentencepiece')}"
    with tempfile.TemporaryDirectory() as scratch:
        return fingerprint(make_tokenizer(spec, None, 0), Path(scratch))


def _hash(*parts: str) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
