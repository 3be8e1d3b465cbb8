"""Tokens on disk: one folder per prepared corpus.

    meta.json             written last; see below
    train.bin             token ids, little-endian, one end-of-text id in front of each document
    train.documents       uint64 little-endian: the index of each document's first token
    train.origins         uint32 little-endian pairs: each document's file (an index into
                          meta.json's "files") and its line or record there (0: the whole file)
    train.mask            only of sft: and task: sources: a byte a token, 1 if it is a target
    validation.*          the same
    tokenizer/            see `jaxgpt.tokenizer.save_tokenizer`
    pack-1024/            plans of packing, made when first asked for; see `jaxgpt.data.packing`

    meta.json: {"format": 2, "dtype": "uint16", "vocab_size", "end_of_text", "key", "files",
      "dropped": {rule: {"documents", "examples"}},
      "masked": {kind: {"masks", "documents", "examples"}},
      "splits": {"train": {"tokens", "documents", "bytes", "sha256",
                           "parts": [{"source", "weight", "tokens", "documents", "bytes"}],
                           "learnt": {"tokens", "bytes"}  (with a mask)}},
      "checksums": {"train.bin": {"bytes", "crc32": [one per 64 MiB]}},
      "checksum": of all the rest}

A mixture's sources are the parts of a split, one after the other. The folder is written under
another name and renamed when it is complete. Checksums are compared when a folder is opened, and
again only after the size or a time stamp of one of its files has changed.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxgpt.system.console import say
from jaxgpt.system.encoding import printable
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged, Missing, read_json, remove_any, write_whole
from jaxgpt.text.files import local_stamp

FORMAT = 2
META = "meta.json"
COUNTS = {"tokens": int, "documents": int, "bytes": int}
SCHEMA = {
    "format": int,
    "dtype": str,
    "vocab_size": int,
    "end_of_text": int,
    "key": str,
    "files": [str],
    "dropped": {str: {"documents": int, "examples": list}},
    "masked?": {str: {"masks": int, "documents": int, "examples": list}},
    "splits": {
        str: COUNTS
        | {"sha256": str, "parts": [COUNTS | {"source": str, "weight": str}]}
        | {"learnt?": {"tokens": int, "bytes": int}}
    },
    "checksums": {str: {"bytes": int, "crc32": [int]}},
    "checksum?": str,
}
VERIFIED = ".verified.json"
CRC_BLOCK = 64 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """One source's share of a split: tokens `first` .. `end` - 1."""

    source: str
    weight: Fraction
    first: int
    end: int
    documents: int


@dataclasses.dataclass(frozen=True)
class Split:
    """One token stream and what evaluation needs to know about its text."""

    folder: Path
    name: str
    tokens: np.ndarray  # memory-mapped
    starts: np.ndarray  # index of each document's first token, its end-of-text
    origins: np.ndarray  # [documents, 2]: file and row
    files: list[str]
    documents: int
    bytes: int  # UTF-8, without the end-of-text tokens
    end_of_text: int
    digest: str
    parts: tuple[Part, ...]
    mask: np.ndarray | None  # which tokens are targets, where not all are
    num_targets: int
    target_bytes: int  # UTF-8, of the text whose tokens are targets

    def origin(self, token: int) -> tuple[int, str]:
        """Returns (number, name) of the document that holds `token`."""
        number = int(np.searchsorted(self.starts, token, side="right")) - 1
        file, row = map(int, self.origins[number])
        return number, self.files[file] + (f":{row}" if row else "")


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def checksums_of(path: Path) -> dict:
    """Returns the checksums of a file, after making sure that its bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "crc32": list(_block_crcs(path))}


def _block_crcs(path: Path) -> Iterator[int]:
    with open(path, "rb") as file:
        while block := file.read(CRC_BLOCK):
            yield zlib.crc32(block)


class SplitWriter:
    """Writes one split's files, document by document."""

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype, files: dict[str, int], masked: bool
    ):
        self.folder, self.name, self.dtype, self.files = folder, name, dtype, files
        self.out = open(folder / f"{name}.bin", "wb")
        self.starts, self.origins = array("Q"), array("I")
        self.parts: list[dict] = []
        self.mask = open(folder / f"{name}.mask", "wb") if masked else None
        self.targets = {"tokens": 0, "bytes": 0}
        self.last_is_target = False  # the last token written

    def begin_part(self, source: str, weight: Fraction) -> None:
        """Starts the share of another source."""
        self.parts.append({"source": source, "weight": str(weight)} | dict.fromkeys(COUNTS, 0))

    def begin_document(self, file: str, row: int, end_of_text: int) -> None:
        """Writes the end-of-text token in front of a document.

        It ends the document before and is a target if the last token of that is.
        """
        self.starts.append(self.out.tell() // self.dtype.itemsize)
        self.origins.extend((self.files.setdefault(printable(file), len(self.files)), row))
        self.parts[-1]["documents"] += 1
        self.extend(np.array([end_of_text]), 0, np.array([self.last_is_target]))

    def extend(
        self, ids: np.ndarray, num_bytes: int, is_target=None, target_bytes: int = 0
    ) -> None:
        """Writes tokens of the current document, whose text has `num_bytes`.

        `is_target` says which of them the loss counts (None: all), and `target_bytes` the bytes of
        their text.
        """
        if self.mask:
            if is_target is None:
                is_target, target_bytes = np.ones(len(ids), bool), num_bytes
            self.mask.write(is_target.astype(np.uint8).tobytes())
            self.targets["tokens"] += int(np.count_nonzero(is_target))
            self.targets["bytes"] += target_bytes
            self.last_is_target = bool(is_target[-1]) if len(ids) else self.last_is_target
        self.out.write(ids.astype(self.dtype).tobytes())
        self.parts[-1]["tokens"] += len(ids)
        self.parts[-1]["bytes"] += num_bytes

    def close(self) -> dict:
        """Returns the split's entry in meta.json."""
        starts, origins = np.array(self.starts, "<u8"), np.array(self.origins, "<u4")
        (self.folder / f"{self.name}.documents").write_bytes(starts.tobytes())
        (self.folder / f"{self.name}.origins").write_bytes(origins.tobytes())
        entry = {name: sum(part[name] for part in self.parts) for name in COUNTS}
        token_hash = _close_and_hash(self.out)
        if self.mask:
            token_hash.update(_close_and_hash(self.mask).digest())
            entry["learnt"] = self.targets
        return entry | {"sha256": token_hash.hexdigest(), "parts": self.parts}


def _close_and_hash(file: BinaryIO):
    file.close()
    with open(file.name, "rb") as written:
        return hashlib.file_digest(written, "sha256")


def write_meta(folder: Path, meta: dict) -> None:
    """Writes meta.json, with the checksums of all files of the folder, which it completes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    checksums = {path.relative_to(folder).as_posix(): checksums_of(path) for path in files}
    meta = {"format": FORMAT} | meta | {"checksums": checksums}
    (folder / META).write_text(json.dumps(meta | {"checksum": _checksum(meta)}, indent=1))


def _checksum(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def read_meta(folder: Path, number: int = FORMAT, schema: dict = SCHEMA) -> dict:
    """Returns the folder's meta.json, of this format and schema. Raises `BadInput` if `folder` is
    not a prepared corpus, of another format, or damaged."""
    try:
        meta = read_json(folder / META, {"format": object})
    except Missing as e:
        raise BadInput(
            f"{folder} holds no token shards (no {META}); write some with jaxgpt.prepare --out"
        ) from e
    if meta["format"] != number:
        raise BadInput(f"{folder} has shard format {meta['format']}, not {number}; prepare again")
    meta = read_json(folder / META, schema)
    checksum = meta.pop("checksum", None)
    if checksum != _checksum(meta) and (checksum or "masked" in meta):  # older files have neither
        raise Damaged(folder / META, "its checksum differs")
    return meta


def read_splits(folder: Path, *names: str) -> tuple[dict, list[Split]]:
    """Returns meta.json and the splits `names`, their tokens memory-mapped. Raises `BadInput` if
    there is no such split, or any file of the folder is damaged."""
    meta = read_meta(folder)
    return meta, open_splits(folder, meta, names, _split)


def open_splits(folder: Path, meta: dict, names: Sequence[str], open_one: Callable) -> list:
    """Returns `open_one(folder, name, meta)` of the splits `names`, once the files are verified.
    Raises `BadInput` if there is no such split, or a file is damaged."""
    for name in names:
        if name not in meta["splits"]:
            raise BadInput(f"{folder} has no split {name!r}, only {', '.join(meta['splits'])}")
    verify_checksums(folder, meta["checksums"])
    try:
        return [open_one(folder, name, meta) for name in names]
    except (OSError, TypeError, ValueError) as e:  # meta.json is older than its own checksum
        raise Damaged(folder, f"{META} does not fit its files ({e})") from e


def _split(folder: Path, name: str, meta: dict) -> Split:
    def array_of(kind: str, dtype: str | np.dtype) -> np.ndarray:
        return np.memmap(folder / f"{name}.{kind}", dtype, "r")

    entry = meta["splits"][name]
    parts, first = [], 0
    for part in entry["parts"]:
        end = first + part["tokens"]
        parts.append(Part(part["source"], Fraction(part["weight"]), first, end, part["documents"]))
        first = end
    targets = entry.get("learnt", {"tokens": entry["tokens"] - 1, "bytes": entry["bytes"]})
    return Split(
        folder,
        name,
        tokens=array_of("bin", np.dtype(meta["dtype"]).newbyteorder("<")),
        starts=array_of("documents", "<u8"),
        origins=array_of("origins", "<u4").reshape(-1, 2),
        files=meta["files"],
        documents=entry["documents"],
        bytes=entry["bytes"],
        end_of_text=meta["end_of_text"],
        digest=entry["sha256"],
        parts=tuple(parts),
        mask=array_of("mask", "u1") if "learnt" in entry else None,
        num_targets=targets["tokens"],
        target_bytes=targets["bytes"],
    )


def verify_checksums(folder: Path, checksums: dict) -> None:
    """Compares files with their checksums, those that have changed since the last time. Raises
    `Damaged`, naming the file that is missing, unreadable, cut short or altered."""
    stamps = {}  # of the files when their checksums were last compared
    try:
        stamps = read_json(folder / VERIFIED, {str: [int]})
    except Missing:
        pass
    except Damaged as e:
        say(f"data      {e}; all checksums are compared again")
        if os.access(folder, os.W_OK):
            remove_any(folder / VERIFIED)
    verified = dict(stamps)
    for name, expected in checksums.items():
        file = folder / name
        try:
            stamp = local_stamp(file)
            if stamp[0] != expected["bytes"]:
                raise Damaged(file, f"it is not {expected['bytes']:,} bytes long")
            if stamps.get(name) != stamp:
                _compare(file, expected["crc32"])
                verified[name] = stamp
        except OSError as e:
            raise Damaged(file, f"it cannot be read ({e.strerror or e})") from e
    if verified != stamps and os.access(folder, os.W_OK):
        write_whole(folder / VERIFIED, json.dumps(verified))


def _compare(file: Path, crcs: list[int]) -> None:
    for number, (crc, actual) in enumerate(zip_longest(crcs, _block_crcs(file))):
        if crc != actual:
            first, end = number * CRC_BLOCK, (number + 1) * CRC_BLOCK
            raise Damaged(file, f"between bytes {first:,} and {end:,} its checksum differs")
