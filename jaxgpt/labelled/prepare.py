"""Rows to arrays on disk, cached under a hash of everything that they depend on."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from jaxgpt.config import Config
from jaxgpt.data.cache import load_or_write
from jaxgpt.data.prepare import CacheKey, cache_folder, check_data, hash_of, out_folder
from jaxgpt.labelled.classification import Classification, TokenClassification
from jaxgpt.labelled.examples import Example, RowTask
from jaxgpt.labelled.labels import MOST
from jaxgpt.labelled.rows import KINDS, Row, open_rows
from jaxgpt.labelled.seq2seq import Seq2Seq
from jaxgpt.labelled.span_qa import SpanQa
from jaxgpt.labelled.store import FORMAT, RowSplit, RowWriter, read_row_splits, write_rows_meta
from jaxgpt.metrics.progress import Bar, elapsed
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import path_of
from jaxgpt.system.stores import is_object_store
from jaxgpt.text.pieces import num_bytes
from jaxgpt.text.sources import Source
from jaxgpt.tokenizer import Tokenizer, load_tokenizer, make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.base import TrainingText
from jaxgpt.tokenizer.load import check_spec, fingerprint, is_trained

TASKS = {task.name: task for task in (Seq2Seq, Classification, TokenClassification, SpanQa)}
AT_ONCE = 1024  # rows that are tokenized together


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """Rows ready to train on; see `objectives.companions.Companions.prepare`."""

    folder: Path
    train: RowSplit
    validation: RowSplit
    tokenizer: Tokenizer

    dropped = {}  # nothing is cleaned
    masked = {}

    @property
    def fingerprint(self) -> str:
        """A hash of all arrays: equal fingerprints, equal batches."""
        text = f"{self.train.digest} {self.validation.digest} {self.train.labels}"
        weights = [str(part.weight) for part in self.train.parts]
        return hashlib.blake2b(f"{text} {weights}".encode(), digest_size=16).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """How much there is of it, over both splits."""
        splits = self.train, self.validation
        return {
            "documents": sum(split.rows for split in splits),
            "tokens": sum(split.tokens for split in splits),
            "bytes": sum(split.bytes for split in splits),
        }

    @property
    def summary(self) -> dict:
        """Its sizes, as JSON."""
        sizes = {
            f"{split.name} {what}": count
            for split in (self.train, self.validation)
            for what, count in (("rows", split.rows), ("tokens", split.tokens))
        }
        return sizes | {"vocabulary": self.tokenizer.vocab_size}

    def __str__(self) -> str:
        train, validation = self.train.rows, self.validation.rows
        return (
            f"{train:,} train and {validation:,} validation rows, {self.counts['tokens']:,} tokens"
        )


def task_of(config: Config, tokenizer: Tokenizer | None = None) -> RowTask:
    """Returns the config's objective, as it reads rows."""
    return TASKS[config.objective](config, tokenizer)


def check_rows(config: Config) -> None:
    """Raises `BadInput` for a source or tokenizer that cannot be used, or an objective that the
    model cannot learn; reads no row."""
    task_of(config).check()
    if not config.data.source.startswith("shards:"):
        _find(config, cache_folder(config.data))


def check_source(config: Config) -> None:
    """Raises `BadInput` for a source or tokenizer that the config's objective cannot use, whatever
    that is; reads no data."""
    if config.objective in TASKS:
        check_rows(config)
    else:
        check_data(config.data)


def prepare_rows(config: Config, out: str = "") -> PreparedRows:
    """Returns the rows of `data.source` as arrays, written now if the cache has none, or into the
    folder `out`.

    Raises:
      BadInput: for a source, a row or a tokenizer that cannot be used.
    """
    check_rows(config)
    cfg, cache = config.data, cache_folder(config.data)
    read = partial(_read, objective=config.objective)
    if cfg.source.startswith("shards:"):
        return read(path_of(cfg.source.removeprefix("shards:"), "data.source=shards"))
    if is_object_store(out):
        raise BadInput(f"--out={out}: rows are prepared into a local folder; copy that")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"data.cache_dir {cache} cannot be made: {e}") from e
    tokenizer, sources, validation = _find(config, cache)
    own = [source.validation for source in sources if source.validation]

    def make_key() -> str:
        identities = [f"{s.weight} {s.identity()}" for s in (*sources, *validation, *own)]
        split = "validation" if validation else f"own {cfg.validation_fraction}"
        made = f"{cfg.tokenizer} {cfg.special_tokens}" if tokenizer is None else ""
        made = made or fingerprint(tokenizer)
        return hash_of(*_settings(config), split, str(len(validation)), *identities, made)

    key = CacheKey((*sources, *validation), make_key)
    write = partial(_write, config, sources, validation, tokenizer, key)
    folder = out_folder(out, key.value) if out else cache / key.value
    if out and folder.exists():
        return read(folder)
    return load_or_write(folder, cache / "locks", write, read)


def prepare_whole_rows(source: str, config: Config, tokenizer: Tokenizer) -> RowSplit:
    """Returns all rows of `source` as one split, for evaluation with a trained tokenizer."""
    cache = cache_folder(config.data)
    sources = open_rows(source, config.data, cache)
    settings = *_settings(config), "whole", fingerprint(tokenizer)
    key = CacheKey(sources, lambda: hash_of(*settings, *[s.identity() for s in sources]))

    def write(scratch: Path) -> None:
        counted = [(s, partial(_range, s, 0, None), _count(s)) for s in sources]
        _write_splits(scratch, config, {"whole": counted}, tokenizer, key)

    return load_or_write(
        cache / key.value,
        cache / "locks",
        write,
        lambda folder: read_row_splits(folder, "whole")[1][0],
    )


def _settings(config: Config) -> tuple[str, ...]:
    """Returns all that decides what is stored of a row, besides it and the tokenizer."""
    fields = dataclasses.asdict(task_of(config).cfg)
    for later in ("labels", "class_weights", "pooling"):  # these choose only what is read of it
        fields.pop(later, None)
    return str(FORMAT), config.objective, json.dumps(fields, sort_keys=True)


def _find(config: Config, cache: Path) -> tuple[Tokenizer | None, tuple, tuple]:
    """Returns the tokenizer, None if it is to be trained, the sources and those of
    `data.validation_source`; reads no row."""
    cfg = config.data
    check_spec(cfg.tokenizer)
    for field, value, default in (("clean", cfg.clean, ""), ("pack", cfg.pack, False)):
        if value != default:
            raise BadInput(f"data.{field}={value}: objective={config.objective} has no such step")
    tokenizer = None
    if not is_trained(cfg.tokenizer):
        tokenizer = make_tokenizer(cfg.tokenizer, special_tokens=cfg.special_tokens)
    sources = open_rows(cfg.source, cfg, cache)
    validation = open_rows(cfg.validation_source, cfg, cache) if cfg.validation_source else ()
    return tokenizer, sources, validation


def _read(folder: Path, objective: str) -> PreparedRows:
    meta, (train, validation) = read_row_splits(folder, "train", "validation")
    if meta["objective"] != objective:
        raise BadInput(f"{folder} was prepared for objective={meta['objective']}, not {objective}")
    return PreparedRows(folder, train, validation, load_tokenizer(folder / "tokenizer"))


Selected = tuple[Source, Callable[[], Iterator[Row]], int]  # some rows of a source, how many


def _write(config, sources, validation, tokenizer, key: CacheKey, scratch: Path) -> None:
    """Splits, trains the tokenizer if it is to be, tokenizes and writes."""
    cfg, splits = config.data, {"train": [], "validation": []}
    say(f"data      preparing {cfg.source}")
    for source in sources:
        count = _count(source)
        held_out = 0
        if not validation and not source.validation:
            held_out = max(1, round(count * cfg.validation_fraction))
            if count < 2:
                raise BadInput(f"{source.spec} has one row, too few to hold some out")
            held_out = min(held_out, count - 1)
            rows = partial(_range, source, count - held_out, None)
            splits["validation"].append((source, rows, held_out))
        splits["train"].append(
            (source, partial(_range, source, 0, count - held_out), count - held_out)
        )
    own = [source.validation for source in sources if source.validation]
    for source in validation or own:
        splits["validation"].append((source, partial(_range, source, 0, None), _count(source)))
    if tokenizer is None:
        tokenizer = _trained(config, splits["train"])
    _write_splits(scratch, config, splits, tokenizer, key)


def _range(source: Source, first: int, end: int | None) -> Iterator[Row]:
    return itertools.islice(source.documents(), first, end)


def _count(source: Source) -> int:
    """Returns how many rows a source has. Raises `BadInput` if it has none."""
    if count := sum(1 for _ in source.documents()):
        return count
    raise BadInput(f"data source {source.spec} is empty: it holds no row; choose {KINDS}")


def _trained(config: Config, selected: list[Selected]) -> Tokenizer:
    """Returns the tokenizer that is trained on the texts of the training part."""
    cfg, task = config.data, task_of(config)

    def texts(rows: Callable[[], Iterator[Row]]) -> Iterator[str]:
        return (text for row in rows() for text in task.parse(row).texts)

    say(f"data      training {cfg.tokenizer} on the training part")
    with elapsed(f"data      training {cfg.tokenizer}:"):
        samples = [
            TrainingText(
                partial(texts, rows), sum(map(num_bytes, texts(rows))), float(source.weight)
            )
            for source, rows, _ in selected
        ]
        return make_tokenizer(cfg.tokenizer, samples, cfg.special_tokens)


def _write_splits(
    scratch: Path,
    config: Config,
    splits: dict[str, list[Selected]],
    tokenizer: Tokenizer,
    key: CacheKey,
) -> None:
    """Writes the tokenizer, the arrays of each split, and meta.json."""
    save_tokenizer(tokenizer, scratch / "tokenizer")
    task, files, labels = task_of(config, tokenizer), {}, {}
    writers = {name: RowWriter(scratch, name, task.dtypes, files) for name in splits}
    total = sum(count for selected in splits.values() for _, _, count in selected)
    with Bar("data      tokenizing", total, "rows") as bar:
        for name, selected in splits.items():
            for source, rows, _ in selected:
                writers[name].begin_part(source.spec, source.weight)
                for batch in _batches(rows()):
                    _write_rows(writers[name], task, batch, labels)
                    bar.advance(len(batch))
    key.check()
    meta = {
        "objective": config.objective,
        "vocab_size": tokenizer.vocab_size,
        "key": key.value,
        "files": list(files),
        "labels": list(labels),
        "arrays": task.dtypes,
        "splits": {name: writer.close(len(labels)) for name, writer in writers.items()},
    }
    write_rows_meta(scratch, meta)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, AT_ONCE)):
        yield batch


def _write_rows(writer: RowWriter, task: RowTask, rows: Iterable[Row], labels: dict[str, int]):
    """Writes some rows; `labels` numbers their labels as they come."""
    examples = [(row, task.parse(row)) for row in rows]
    tokens = iter(task.tokenizer.encode_batch([t for _, e in examples for t in e.texts]))
    for row, example in examples:
        ids = [next(tokens) for _ in example.texts]
        numbers = [labels.setdefault(label, len(labels)) for label in example.labels]
        if len(labels) > MOST:
            field = task.flag("label_field" if task.name == "classification" else "labels_field")
            raise BadInput(
                f"{row.where}: there are over {MOST:,} different labels; is {field} right?"
            )
        writer.add(row.file, row.number, task.encode(example, ids, numbers), **_sizes(example, ids))
        writer.count_labels(numbers)


def _sizes(example: Example, ids: list) -> dict[str, int]:
    return {
        "tokens": sum(map(len, ids)),
        "bytes": sum(map(num_bytes, example.texts)),
        "target_bytes": num_bytes(example.target),
        "skipped": sum(not len(i) for i in ids),
    }
