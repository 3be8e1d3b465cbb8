"""Rows on disk: named arrays whose rows differ in length, one folder per prepared data set.

    meta.json             written last; see SCHEMA
    train.NAME.values     the array NAME of all rows, one after the other, little-endian
    train.NAME.ends       uint64 little-endian: where each row's part ends
    train.origins         uint32 little-endian pairs: each row's file (an index into meta.json's
                          "files") and its number there
    validation.*          the same
    tokenizer/            see `jaxgpt.tokenizer.save_tokenizer`

Rows of 3, 0 and 2 tokens: `ends` are 3, 3, 5. Labels are numbers into meta.json's "labels", whose
order is not that of the model's (see `labels.ids_of`). Folders are renamed when complete and
checked when opened, as token shards are (`data.shards`).
"""

import dataclasses
import hashlib
from array import array
from fractions import Fraction
from pathlib import Path

import numpy as np

from jaxgpt.data.shards import open_splits, read_meta, write_meta
from jaxgpt.system.encoding import printable

FORMAT = 1001  # apart from the numbers of token shards
COUNTS = {"rows": int, "tokens": int, "bytes": int, "target_bytes": int}
SCHEMA = {
    "format": int,
    "objective": str,
    "vocab_size": int,
    "key": str,
    "files": [str],
    "labels": [str],
    "arrays": {str: str},
    "splits": {
        str: COUNTS
        | {"sha256": str, "label_counts": [int], "skipped": int}
        | {"parts": [{"source": str, "weight": str, "rows": int}]}
    },
    "checksums": {str: {"bytes": int, "crc32": [int]}},
    "checksum": str,
}


@dataclasses.dataclass(frozen=True)
class Ragged:
    """An array of each row: `ragged[i]` is row i's."""

    values: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        start = int(self.ends[row - 1]) if row else 0
        return self.values[start : int(self.ends[row])]

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the lengths of some rows' parts, int64, without reading the others'."""
        ends = self.ends[rows].astype(np.int64)
        return ends - np.where(rows > 0, self.ends[np.maximum(rows - 1, 0)].astype(np.int64), 0)

    @property
    def lengths(self) -> np.ndarray:
        """The length of each row's part, int64."""
        return np.diff(self.ends.astype(np.int64), prepend=0)


@dataclasses.dataclass(frozen=True)
class Part:
    """One source's share of a split: rows `first` .. `end` - 1."""

    source: str
    weight: Fraction
    first: int
    end: int


@dataclasses.dataclass(frozen=True)
class RowSplit:
    """The rows of a split."""

    name: str
    arrays: dict[str, Ragged]
    origins: np.ndarray  # [rows, 2]: file and number
    files: list[str]
    rows: int
    tokens: int
    bytes: int  # UTF-8, of all texts
    target_bytes: int  # of those that are predicted
    skipped: int  # labelled words without a token
    labels: list[str]  # names of the numbers in the arrays
    label_counts: list[int] = dataclasses.field(default_factory=list)
    parts: tuple[Part, ...] = ()
    digest: str = ""

    def where(self, row: int) -> str:
        """Returns the row's file and number."""
        file, number = map(int, self.origins[row])
        return f"{self.files[file]}, row {number}"


class RowWriter:
    """Writes one split's files, row by row."""

    def __init__(self, folder: Path, name: str, dtypes: dict[str, str], files: dict[str, int]):
        self.folder, self.name, self.dtypes, self.files = folder, name, dtypes, files
        self.out = {array_name: open(self._file(array_name), "wb") for array_name in dtypes}
        self.ends = {array_name: array("Q") for array_name in dtypes}
        self.origins, self.parts = array("I"), []
        self.counts = dict.fromkeys(COUNTS, 0) | {"skipped": 0}
        self.label_counts: dict[int, int] = {}

    def _file(self, array_name: str) -> Path:
        return self.folder / f"{self.name}.{array_name}.values"

    def begin_part(self, source: str, weight: Fraction) -> None:
        """Starts the share of another source."""
        self.parts.append({"source": source, "weight": str(weight), "rows": 0})

    def add(self, file: str, number: int, arrays: dict[str, np.ndarray], **counts: int) -> None:
        """Writes a row; `counts` are what it adds to those of the split, without `rows`."""
        self.origins.extend((self.files.setdefault(printable(file), len(self.files)), number))
        for name, values in arrays.items():
            self.out[name].write(np.asarray(values, self.dtypes[name]).tobytes())
            ends = self.ends[name]
            ends.append((ends[-1] if ends else 0) + len(values))
        for name, count in (counts | {"rows": 1}).items():
            self.counts[name] += count
        self.parts[-1]["rows"] += 1

    def count_labels(self, ids: list[int]) -> None:
        """Counts the labels of a row."""
        for label in ids:
            self.label_counts[label] = self.label_counts.get(label, 0) + 1

    def close(self, num_labels: int) -> dict:
        """Returns the split's entry in meta.json."""
        digest = hashlib.sha256()
        for name, out in self.out.items():
            out.close()
            ends = np.array(self.ends[name], "<u8").tobytes()
            (self.folder / f"{self.name}.{name}.ends").write_bytes(ends)
            with open(out.name, "rb") as written:
                digest.update(hashlib.file_digest(written, "sha256").digest() + ends)
        origins = np.array(self.origins, "<u4").tobytes()
        (self.folder / f"{self.name}.origins").write_bytes(origins)
        label_counts = [self.label_counts.get(i, 0) for i in range(num_labels)]
        entry = {"sha256": digest.hexdigest(), "label_counts": label_counts, "parts": self.parts}
        return self.counts | entry


def write_rows_meta(folder: Path, meta: dict) -> None:
    """Writes meta.json, which completes the folder."""
    write_meta(folder, {"format": FORMAT} | meta)


def read_rows_meta(folder: Path) -> dict:
    """Returns the folder's meta.json. Raises `BadInput` if `folder` holds no rows."""
    return read_meta(folder, FORMAT, SCHEMA)


def read_row_splits(folder: Path, *names: str) -> tuple[dict, list[RowSplit]]:
    """Returns meta.json and the splits `names`, memory-mapped. Raises `BadInput` if there is no
    such split, or any file of the folder is damaged."""
    meta = read_rows_meta(folder)
    return meta, open_splits(folder, meta, names, _split)


def _split(folder: Path, name: str, meta: dict) -> RowSplit:
    entry, parts, first = meta["splits"][name], [], 0
    for part in entry["parts"]:
        end = first + part["rows"]
        parts.append(Part(part["source"], Fraction(part["weight"]), first, end))
        first = end

    def file(ending: str, dtype: str) -> np.ndarray:
        path = folder / f"{name}.{ending}"
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

    arrays = {}
    for array_name, dtype in meta["arrays"].items():
        values, ends = file(f"{array_name}.values", dtype), file(f"{array_name}.ends", "<u8")
        if len(ends) != entry["rows"] or (len(ends) and int(ends[-1]) != len(values)):
            raise ValueError(f"{array_name} has other rows")
        arrays[array_name] = Ragged(values, ends)
    return RowSplit(
        name,
        arrays,
        file("origins", "<u4").reshape(-1, 2),
        labels=meta["labels"],
        files=meta["files"],
        parts=tuple(parts),
        digest=entry["sha256"],
        label_counts=entry["label_counts"],
        skipped=entry["skipped"],
        **{count: entry[count] for count in COUNTS},
    )
