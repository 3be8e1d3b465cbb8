"""Rows with named fields: JSON, parquet, tables of text, datasets of the hub, mixtures of them."""

import codecs
import csv
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from jaxgpt.config import DataConfig
from jaxgpt.hub.datasets import dataset_files
from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput, did_you_mean
from jaxgpt.text.files import LONGEST, list_files, open_file
from jaxgpt.text.formats import json_rows
from jaxgpt.text.sources import Source, file_source, open_sources

KINDS = "jsonl:GLOB, parquet:GLOB, csv:GLOB, tsv:GLOB, hf:ORG/NAME, or a mixture of them"
DELIMITERS = {"csv": ",", "tsv": "\t"}


class Row(NamedTuple):
    """The fields of one row, and where it is: file, number from 1, and both for messages."""

    fields: dict
    file: str
    number: int
    where: str


def open_rows(source: str, cfg: DataConfig, cache: Path) -> tuple[Source, ...]:
    """Returns the sources of a mixture, else the one source; their documents are `Row`s. Raises
    `BadInput` as `text.sources.open_sources` does."""
    return open_sources(source, cfg, cache, open_one=_open)


def _open(spec: str, cfg: DataConfig, cache: Path, _=None) -> Source:
    kind, _, argument = spec.partition(":")
    readers: dict[str, Callable[[str], Iterator[Row]]] = {
        "jsonl": read_json,
        "parquet": read_json,
        "csv": partial(read_table, delimiter=DELIMITERS["csv"]),
        "tsv": partial(read_table, delimiter=DELIMITERS["tsv"]),
        "hf": read_json,
    }
    if kind not in readers or not argument:
        raise BadInput(
            f"data source {spec!r} has no rows with fields, which the objective needs: choose"
            f" {KINDS}{did_you_mean(kind, readers)}"
        )
    if kind == "hf" or argument.startswith("hf:"):
        splits = dataset_files(argument.removeprefix("hf:"), cache)
    else:
        splits = list_files(spec, argument), []

    def part(files: list[str]) -> Source:
        read = partial(_chained, readers[kind], files)
        return file_source(spec, f"rows {kind}", read, files, cache)

    train, validation = splits
    opened = part(train)
    return dataclasses.replace(opened, validation=part(validation)) if validation else opened


def _chained(read: Callable[[str], Iterator[Row]], files: list[str]) -> Iterator[Row]:
    return chain.from_iterable(map(read, files))


def read_json(file: str) -> Iterator[Row]:
    """Yields the rows of a file of JSON or parquet (see `text.formats.json_rows`)."""
    for where, number, row in json_rows([file]):
        if not isinstance(row, dict):
            raise BadInput(f"{where} is no object with fields, but {str(row)!r:.80}")
        yield Row(row, file, number, where)


def read_table(file: str, delimiter: str) -> Iterator[Row]:
    """Yields the rows of a table of text whose first line names the fields. With tabs between them,
    quotes are like any other character. Raises `BadInput` if a row has more or fewer fields."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    csv.field_size_limit(LONGEST)
    with open_file(file) as stream:
        lines = codecs.iterdecode(stream, "utf-8-sig")
        table, where = csv.reader(lines, delimiter=delimiter, quoting=quoting), file
        try:
            names = next(table, [])
            if len(set(names)) < len(names) or not all(names):
                raise BadInput(f"{file}: its first line must name the fields, each another name")
            for number, values in enumerate(filter(None, table), start=1):
                where = f"{file}, row {number}"
                if len(values) != len(names):
                    raise BadInput(f"{where} has {len(values)} fields, not {len(names)}")
                yield Row(dict(zip(names, values, strict=True)), file, number, where)
        except (csv.Error, UnicodeDecodeError) as e:
            raise BadInput(f"{file} cannot be read after {where}: {e}") from e


def field_of(row: Row, name: str, flag: str) -> object:
    """Returns a field's value. Raises `BadInput`, which names the row and the `flag` that chooses
    another field, if the row lacks it."""
    if name in row.fields:
        return row.fields[name]
    has = ", ".join(map(str, row.fields)) or "none"
    raise BadInput(f"{row.where} has no field {name!r} (its fields are {has}); set {flag}")


def text_of(row: Row, name: str, flag: str) -> str:
    """Returns the text in a field. Raises `BadInput` if it is missing or no text."""
    value = field_of(row, name, flag)
    if not isinstance(value, str):
        raise BadInput(f"{row.where}: field {name!r} is no text, but {value!r:.80}; set {flag}")
    return check_text(value, f"{row.where}, field {name!r},")
