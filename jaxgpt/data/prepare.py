"""Text to token shards, cached under a hash of everything that they depend on."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from jaxgpt.config import DataConfig
from jaxgpt.data.remote import fetched, publish
from jaxgpt.data.shards import (
    FORMAT,
    META,
    Split,
    cached,
    checksums_of,
    read_meta,
    read_split,
    token_dtype,
    verify,
    write_meta,
    write_once,
)
from jaxgpt.data.split import Part, hold_out, scan
from jaxgpt.data.tokenize import write_split
from jaxgpt.metrics.progress import Bar
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged, path_of
from jaxgpt.system.stores import is_object_store
from jaxgpt.text.cleaning import Report, clean_documents, cleaning_identity, make_steps
from jaxgpt.text.files import file_stamp, is_young
from jaxgpt.text.pieces import Documents, Piece, num_bytes
from jaxgpt.text.sources import Source, open_sources
from jaxgpt.tokenizer import Tokenizer, load_tokenizer, make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.base import TrainingText
from jaxgpt.tokenizer.load import check_spec, describes, fingerprint, is_trained


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
        text = f"{self.train.digest} {self.validation.digest}"
        weights = [str(part.weight) for part in self.train.parts]
        text += f" {weights}" if len(weights) > 1 else ""
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def dropped(self) -> dict[str, dict]:
        """What cleaning left out: `{rule: {"documents", "examples"}}`."""
        return read_meta(self.folder)["dropped"]

    @property
    def masked(self) -> dict[str, dict]:
        """What cleaning replaced: `{kind: {"masks", "documents", "examples"}}`."""
        return read_meta(self.folder).get("masked", {})

    @property
    def summary(self) -> dict:
        """What there is to say about it, as JSON."""
        found = {}
        for name in ("train", "validation"):
            entry = read_meta(self.folder)["splits"][name]
            found |= {f"{name} {what}": entry[what] for what in ("documents", "tokens", "bytes")}
        dropped = {rule: entry["documents"] for rule, entry in self.dropped.items()}
        masked = {kind: entry["masks"] for kind, entry in self.masked.items()}
        return (
            found
            | {"vocabulary": self.tokenizer.vocab_size}
            | ({"dropped": dropped} if dropped else {})
            | ({"masked": masked} if masked else {})
        )


def cache_folder(cfg: DataConfig) -> Path:
    """Returns where prepared corpora live."""
    chosen = cfg.cache_dir or os.environ.get("JAXGPT_CACHE") or "~/.cache/jaxgpt"
    return path_of(chosen, "data.cache_dir")


def prepare(cfg: DataConfig, out: str = "") -> Prepared:
    """Returns the corpus of `cfg` as token shards, written now if the cache has none.

    Everything is in the key that decides: the text, the split rule, the cleaning and the
    tokenizer. `out` names a folder to write to instead of the cache, or a URL to copy it to.

    Raises:
      BadInput: for a source, file, line, step or tokenizer that cannot be used.
    """
    if cfg.source.startswith("shards:"):
        place = cfg.source.removeprefix("shards:")
        if is_object_store(place):
            return fetched(place, cache_folder(cfg), read_prepared)
        return open_prepared(path_of(place, "data.source=shards"))
    cache = cache_folder(cfg)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"data.cache_dir {cache} cannot be made: {e}") from e
    given, sources, held_out = find_data(cfg, cache)

    def make_key() -> str:
        return _hash(
            str(FORMAT),
            *[f"{s.weight} {_identity(s)}" for s in sources],
            *[f"validation {s.identity()}" for s in held_out],
            "" if held_out else str(cfg.validation_fraction),
            cleaning_identity(cfg.clean) if cfg.clean else "",
            f"{cfg.tokenizer} sentencepiece {version('sentencepiece')} {cfg.special_tokens}"
            if given is None
            else fingerprint(given),
        )

    seen = Seen((*sources, *held_out), make_key)

    def write(scratch: Path) -> None:
        _write(cfg, sources, held_out, given, seen.key, scratch)
        seen.check()

    if not out or is_object_store(out):
        prepared = cached(cache / seen.key, cache / "locks", write, read_prepared)
        if out:
            publish(prepared.folder, out)
        return prepared
    folder = _chosen(out, seen.key)
    write_once(folder, cache / "locks", write)
    return open_prepared(folder)


def find_data(
    cfg: DataConfig, cache: Path
) -> tuple[Tokenizer | None, tuple[Source, ...], tuple[Source, ...]]:
    """Returns the tokenizer, None if it is to be trained, and the sources of both splits; reads no
    document yet.

    Raises:
      BadInput: for a tokenizer, cleaning step or source that cannot be, or that has no file.
    """
    check_spec(cfg.tokenizer)
    make_steps(cfg.clean)  # for its errors
    given = None
    if not is_trained(cfg.tokenizer):
        given = make_tokenizer(cfg.tokenizer, special_tokens=cfg.special_tokens)
    sources = open_sources(cfg.source, cfg, cache, given)
    held_out = ()
    if cfg.validation_source:
        held_out = open_sources(cfg.validation_source, cfg, cache, given)
    return given, sources, held_out


class Seen:
    """The key of a corpus, and a check that its files are still those that the key was made of."""

    def __init__(self, sources: tuple[Source, ...], make_key: Callable[[], str]):
        validation = (s.validation.files for s in sources if s.validation)
        self.files = sorted({*(f for s in sources for f in s.files), *chain(*validation)})
        self.make_key, self.stamps = make_key, [file_stamp(file) for file in self.files]
        self.is_young = any(map(is_young, self.stamps))
        self.key = make_key()

    def check(self) -> None:
        """Raises `BadInput` if a file was written to or replaced since it was hashed."""
        for file, before in zip(self.files, self.stamps, strict=True):
            if file_stamp(file) != before:
                raise BadInput(f"{file} changed while it was read; run the command again")
        if self.is_young and self.make_key() != self.key:
            raise BadInput("the text changed while it was read; run the command again")


def _chosen(out: str, key: str) -> Path:
    """Returns the folder that --out names, which is not there, empty, or holds this corpus."""
    folder = path_of(out, "--out")
    if folder.name in ("", ".."):  # ., / and the like
        folder = folder.resolve()
    if (folder / META).exists():
        if read_meta(folder)["key"] != key:
            raise BadInput(f"{folder} already holds another prepared corpus; choose another --out")
    elif folder.exists():
        if not folder.is_dir() or folder.samefile(".") or any(folder.iterdir()):
            raise BadInput(f"{folder} exists and is no prepared corpus; choose another --out")
    return folder


def read_prepared(folder: Path) -> Prepared:
    """Returns what `prepare` wrote into `folder`.

    Raises:
      BadInput: if it is not there or damaged.
    """
    train, validation = read_split(folder, "train"), read_split(folder, "validation")
    sums = read_meta(folder)["checksums"]
    verify(folder, {name: sums[name] for name in sums if name.startswith("tokenizer/")})
    tokenizer = load_tokenizer(folder / "tokenizer")
    return Prepared(folder, train, validation, tokenizer)


def open_prepared(folder: Path) -> Prepared:
    """Returns what `prepare` wrote into a folder that the user named.

    Raises:
      BadInput: if it is not there or damaged; the message says what to do.
    """
    try:
        return read_prepared(folder)
    except Damaged as e:
        raise BadInput(f"{e}; delete {folder} and prepare again") from e


def check_shards(cfg: DataConfig, data: Prepared) -> None:
    """Compares `data.tokenizer` with the tokenizer that comes with `shards:`.

    Says so if the default gives way to another.

    Raises:
      BadInput: if the field names another one.
    """
    if not cfg.source.startswith("shards:") or describes(
        cfg.tokenizer, cfg.special_tokens, data.tokenizer
    ):
        return
    held = f"{data.tokenizer.kind} of {data.tokenizer.vocab_size:,} ids"
    if (cfg.tokenizer, cfg.special_tokens) != (DataConfig.tokenizer, DataConfig.special_tokens):
        more = f" with data.special_tokens={cfg.special_tokens}" if cfg.special_tokens else ""
        raise BadInput(
            f"data.tokenizer={cfg.tokenizer}{more} is not the tokenizer that {cfg.source} was"
            f" prepared with ({held}); leave the field out, or prepare the text again with yours"
        )
    say(f"data      the tokenizer is that of {cfg.source}: {held}")


def prepare_whole(source: str, cfg: DataConfig, tokenizer: Tokenizer, cache: Path) -> Split:
    """Returns the whole of `source` as one split, for evaluation with a trained tokenizer.

    Raises:
      BadInput: see `open_sources`.
    """
    if source.startswith("shards:"):
        raise BadInput("--data=shards:DIR holds splits already; name the text instead")
    cache.mkdir(parents=True, exist_ok=True)
    sources = open_sources(source, cfg, cache, tokenizer)

    def make_key() -> str:
        return _hash(str(FORMAT), *[s.identity() for s in sources], "whole", fingerprint(tokenizer))

    seen = Seen(sources, make_key)

    def write(scratch: Path) -> None:
        sizes = [sum(scan(s.documents, s.spec).sizes) for s in sources]
        files, bar = {}, Bar("data      tokenizing", sum(sizes))
        parts = [(s.spec, s.weight, s.documents) for s in sources]
        masked = any(s.masked for s in sources)
        entry, checksums = write_split(scratch, "whole", parts, tokenizer, files, bar, masked)
        bar.close()
        _write_meta(scratch, tokenizer, seen.key, files, Report(), {"whole": entry}, checksums)
        seen.check()

    return cached(cache / seen.key, cache / "locks", write, partial(read_split, name="whole"))


def _write(
    cfg: DataConfig,
    sources: tuple[Source, ...],
    held_out: tuple[Source, ...],
    given: Tokenizer | None,
    key: str,
    scratch: Path,
) -> None:
    report, steps = Report(), make_steps(cfg.clean)
    sources = [_cleaned(s, steps, report, scratch) for s in sources]
    own = [_cleaned(s.validation, steps, report, scratch) for s in sources if s.validation]
    held_out = [_cleaned(s, steps, report, scratch) for s in held_out]
    train, validation = _parts(sources, own, held_out, cfg.validation_fraction)
    total = sum(part.size for _, part in (*train, *validation))
    documents = f"{cfg.source}: {total / 1e6:,.1f} MB"
    say(f"data      preparing {documents}")
    if given is None:
        say(f"data      training {cfg.tokenizer} on the training part")
    tokenizer = given or make_tokenizer(
        cfg.tokenizer,
        [TrainingText(_texts(part.documents), part.size, float(s.weight)) for s, part in train],
        cfg.special_tokens,
    )
    save_tokenizer(tokenizer, scratch / "tokenizer")
    files, splits, checksums = {}, {}, {}
    for file in (scratch / "tokenizer").iterdir():
        checksums[f"tokenizer/{file.name}"] = checksums_of(file)
    bar = Bar("data      tokenizing", total)
    for name, parts in (("train", train), ("validation", validation)):
        listed = [(s.spec, s.weight, part.documents) for s, part in parts]
        masked = any(s.masked for s, _ in parts)
        splits[name], sums = write_split(scratch, name, listed, tokenizer, files, bar, masked)
        checksums |= sums
    bar.close()
    for spool in scratch.glob("*.spool"):
        spool.unlink()
    _write_meta(scratch, tokenizer, key, files, report, splits, checksums)


def _parts(sources, own, held_out, fraction: float):
    """Returns the (source, Part) pairs of the training and of the validation split."""
    own = iter(own)
    train, validation = [], []
    for source in sources:
        found = scan(source.documents, source.spec)
        everything = Part(source.documents, sum(found.sizes))
        if held_out or source.validation:
            train.append((source, everything))
            if not held_out:
                alone = next(own)
                size = sum(scan(alone.documents, alone.spec).sizes)
                validation.append((alone, Part(alone.documents, size)))
            continue
        if sum(found.sizes) < 2:
            raise BadInput(f"data source {source.spec} is too short to hold out a validation part")
        parts = hold_out(source.documents, found, fraction)
        train.append((source, parts[0]))
        validation.append((source, parts[1]))
    for source in held_out:
        size = sum(scan(source.documents, source.spec).sizes)
        validation.append((source, Part(source.documents, size)))
    return train, validation


def _cleaned(source: Source, steps: list, report: Report, scratch: Path) -> Source:
    """Returns the source with its documents cleaned, written to disk in between.

    The steps remember what came before, so duplicates are found across sources and splits.
    """
    if not steps:
        return source
    spool = scratch / f"{len(list(scratch.glob('*.spool')))}.spool"
    bar = Bar(f"data      cleaning {source.spec}:", source.num_bytes)
    with open(spool, "w") as file:
        for piece in clean_documents(_counted(source.documents, bar), steps, report):
            file.write(json.dumps([piece.text, piece.file, piece.row]) + "\n")
    bar.close()
    if not spool.stat().st_size:
        counts = ", ".join(f"{rule} {e['documents']}" for rule, e in report.dropped.items())
        raise BadInput(
            f"data.clean drops every document of {source.spec} ({counts or 'it has none'})"
        )
    return dataclasses.replace(source, documents=partial(_read_spool, spool))


def _counted(documents: Documents, bar: Bar) -> Iterator[Piece]:
    for piece in documents():
        if piece.tokens is not None or piece.spans:
            raise BadInput("data.clean cleans text, not bin:, sft: or task:; set it to nothing")
        bar.advance(num_bytes(piece.text))
        yield piece


def _read_spool(spool: Path) -> Iterator[Piece]:
    with open(spool) as file:
        for line in file:
            yield Piece(*json.loads(line))


def _texts(documents: Documents):
    return lambda: (piece.text for piece in documents())


def _write_meta(folder, tokenizer, key, files, report: Report, splits, checksums) -> None:
    meta = {
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "key": key,
        "files": list(files),
        "dropped": report.dropped,
        "masked": report.masked,
        "splits": splits,
        "checksums": checksums,
    }
    write_meta(folder, meta)


def _identity(source: Source) -> str:
    own = f" {source.validation.identity()}" if source.validation else ""
    return source.identity() + own


def _hash(*parts: str) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
