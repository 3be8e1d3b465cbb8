"""Tokens on disk: one folder per prepared corpus.

    meta.json             written last; see below
    train.bin             token ids, little-endian, one end-of-text id in front of each document
    train.documents       uint64 little-endian: the place in train.bin where each document starts
    train.origins         uint32 little-endian pairs: each document's file (an index into
                          meta.json's "files") and its line or record there (0: the whole file)
    train.mask            only of sft: and task: sources: a byte a token, 1 where the loss counts it
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

A mixture's sources are the parts of a split, one behind the other. The folder is written under
another name and renamed when whole, so it is there or it is not. Checksums are compared when a
folder is opened, and again only after one of its files' size or time stamp changes.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from jaxgpt.system.console import say
from jaxgpt.system.encoding import printable
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged, Missing, read_json, write_whole
from jaxgpt.text.files import local_stamp

T = TypeVar("T")
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
    bytes: int


@dataclasses.dataclass(frozen=True)
class Split:
    """One token stream and what evaluation must know of its text."""

    folder: Path
    name: str
    tokens: np.ndarray  # memory-mapped
    starts: np.ndarray  # where each document's end-of-text stands
    origins: np.ndarray  # [documents, 2]: file and row
    files: list[str]
    documents: int
    bytes: int  # UTF-8, without the end-of-text marks
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


class ChecksummedFile:
    """A file being written, its checksums kept along the way."""

    def __init__(self, path: Path):
        self.file, self.sha, self.size = open(path, "wb"), hashlib.sha256(), 0
        self.crcs: list[int] = []

    def write(self, raw: bytes) -> None:
        """Appends bytes."""
        self.file.write(raw)
        self.sha.update(raw)
        view = memoryview(raw)
        while view:
            room = CRC_BLOCK - self.size % CRC_BLOCK
            if room == CRC_BLOCK:
                self.crcs.append(0)
            self.crcs[-1] = zlib.crc32(view[:room], self.crcs[-1])
            self.size, view = self.size + len(view[:room]), view[room:]

    def close(self) -> dict:
        """Returns the checksums, the bytes being on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self.size, "crc32": self.crcs}


def checksums_of(path: Path) -> dict:
    """Returns the checksums of a small file that is written already."""
    raw = path.read_bytes()
    blocks = range(0, len(raw), CRC_BLOCK)
    return {"bytes": len(raw), "crc32": [zlib.crc32(raw[at : at + CRC_BLOCK]) for at in blocks]}


class SplitWriter:
    """Writes one split's three files, a document's tokens after the other."""

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype, files: dict[str, int], masked: bool
    ):
        self.folder, self.name, self.dtype, self.files = folder, name, dtype, files
        self.out = ChecksummedFile(folder / f"{name}.bin")
        self.starts, self.origins = array("Q"), array("I")
        self.parts: list[dict] = []
        self.mask = ChecksummedFile(folder / f"{name}.mask") if masked else None
        self.learnt, self.learns = {"tokens": 0, "bytes": 0}, False

    def begin_part(self, source: str, weight: Fraction) -> None:
        """Starts the share of another source."""
        empty = {"tokens": 0, "documents": 0, "bytes": 0}
        self.parts.append({"source": source, "weight": str(weight)} | empty)

    def begin_document(self, file: str, row: int, end_of_text: int) -> None:
        """Writes the end-of-text token in front of a document.

        It is learnt if what it ends, the document before, was learnt up to its end.
        """
        self.starts.append(self.out.size // self.dtype.itemsize)
        self.origins.extend((self.files.setdefault(printable(file), len(self.files)), row))
        self.parts[-1]["documents"] += 1
        self.extend(np.array([end_of_text]), 0, np.array([self.learns]))

    def extend(self, ids: np.ndarray, num_bytes: int, learn=None, learnt_bytes: int = 0) -> None:
        """Writes tokens of the current document and counts its text's bytes.

        `learn` says of which the loss counts; None: of all.
        """
        if self.mask:
            if learn is None:
                learn, learnt_bytes = np.ones(len(ids), bool), num_bytes
            self.mask.write(learn.astype(np.uint8).tobytes())
            self.learnt["tokens"] += int(np.count_nonzero(learn))
            self.learnt["bytes"] += learnt_bytes
            self.learns = bool(learn[-1]) if len(learn) else self.learns
        self.out.write(ids.astype(self.dtype).tobytes())
        self.parts[-1]["tokens"] += len(ids)
        self.parts[-1]["bytes"] += num_bytes

    def close(self) -> tuple[dict, dict]:
        """Returns the split's entry in meta.json and its files' checksums."""
        checksums = {f"{self.name}.bin": self.out.close()}
        for kind, values in (
            ("documents", np.frombuffer(self.starts, np.uint64).astype("<u8")),
            ("origins", np.frombuffer(self.origins, np.uint32).astype("<u4")),
        ):
            file = ChecksummedFile(self.folder / f"{self.name}.{kind}")
            file.write(values.tobytes())
            checksums[f"{self.name}.{kind}"] = file.close()
        sums = {k: sum(part[k] for part in self.parts) for k in ("tokens", "documents", "bytes")}
        digest = self.out.sha
        if self.mask:
            checksums[f"{self.name}.mask"] = self.mask.close()
            digest.update(self.mask.sha.digest())
            sums["learnt"] = self.learnt
        return sums | {"sha256": digest.hexdigest(), "parts": self.parts}, checksums


def write_meta(folder: Path, meta: dict) -> None:
    """Writes meta.json, which declares the folder whole."""
    meta = {"format": FORMAT} | meta
    (folder / META).write_text(json.dumps(meta | {"checksum": _checksum(meta)}, indent=1))


def _checksum(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def read_meta(folder: Path) -> dict:
    """Returns the folder's meta.json.

    Raises:
      BadInput: if `folder` is not a prepared corpus, of another format, or damaged.
    """
    try:
        meta = read_json(folder / META, {"format": object})
    except Missing as e:
        raise BadInput(
            f"{folder} holds no token shards (no {META}); write some with jaxgpt.prepare --out"
        ) from e
    if meta["format"] != FORMAT:
        raise BadInput(f"{folder} has shard format {meta['format']}, not {FORMAT}; prepare again")
    meta = read_json(folder / META, SCHEMA)
    told = meta.pop("checksum", None)
    if told != _checksum(meta) and (told or "masked" in meta):  # older ones have neither
        raise Damaged(folder / META, "its checksum differs")
    return meta


def read_split(folder: Path, name: str) -> Split:
    """Returns a split, its tokens memory-mapped.

    Raises:
      BadInput: if a file is missing or its bytes are not those that were written.
    """
    meta = read_meta(folder)
    if name not in meta["splits"]:
        raise BadInput(f"{folder} has no split {name!r}, only {', '.join(meta['splits'])}")
    verify(folder, {k: v for k, v in meta["checksums"].items() if k.startswith(f"{name}.")})
    try:
        return _split(folder, name, meta)
    except (OSError, TypeError, ValueError) as e:  # of a meta.json from before it had a checksum
        raise Damaged(folder, f"{META} does not fit its files ({e})") from e


def _split(folder: Path, name: str, meta: dict) -> Split:
    entry = meta["splits"][name]
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    parts, first = [], 0
    for part in entry["parts"]:
        end = first + part["tokens"]
        parts.append(
            Part(
                part["source"],
                Fraction(part["weight"]),
                first,
                end,
                part["documents"],
                part["bytes"],
            )
        )
        first = end
    learnt = entry.get("learnt")
    mask = np.memmap(folder / f"{name}.mask", np.uint8, "r") if learnt else None
    return Split(
        folder,
        name,
        np.memmap(folder / f"{name}.bin", dtype, "r"),
        np.memmap(folder / f"{name}.documents", "<u8", "r"),
        np.memmap(folder / f"{name}.origins", "<u4", "r").reshape(-1, 2),
        meta["files"],
        entry["documents"],
        entry["bytes"],
        meta["end_of_text"],
        entry["sha256"],
        tuple(parts),
        mask,
        learnt["tokens"] if learnt else entry["tokens"] - 1,
        learnt["bytes"] if learnt else entry["bytes"],
    )


def verify(folder: Path, checksums: dict) -> None:
    """Compares files with their checksums, those that have changed since the last time.

    Raises:
      Damaged: naming the file that is missing, unreadable, cut short or altered.
    """
    try:
        known = read_json(folder / VERIFIED, {str: [int]})
    except Missing:
        known = {}
    except Damaged as e:
        say(f"data      {e}; all checksums are compared again")
        known = {}
        if os.access(folder, os.W_OK):
            _remove(folder / VERIFIED)
    fresh = dict(known)
    for name, expected in checksums.items():
        file = folder / name
        try:
            stamp = local_stamp(file)
            if stamp[0] != expected["bytes"]:
                raise Damaged(file, f"it is not {expected['bytes']:,} bytes long")
            if known.get(name) != stamp:
                with open(file, "rb") as stream:
                    _compare(file, stream, expected["crc32"])
                fresh[name] = stamp
        except OSError as e:
            raise Damaged(file, f"it cannot be read ({e.strerror or e})") from e
    if fresh != known and os.access(folder, os.W_OK):
        write_whole(folder / VERIFIED, json.dumps(fresh))


def _compare(file: Path, stream: BinaryIO, crcs: list[int]) -> None:
    for number, crc in enumerate(crcs):
        if zlib.crc32(stream.read(CRC_BLOCK)) != crc:
            first, end = number * CRC_BLOCK, (number + 1) * CRC_BLOCK
            raise Damaged(file, f"between bytes {first:,} and {end:,} its checksum differs")


def cached(
    folder: Path, locks: Path, write: Callable[[Path], None], read: Callable[[Path], T]
) -> T:
    """Returns `read(folder)` of what can be made at any time: by `write(scratch)` if it is not
    there, and anew if it is damaged, which is said in one line.

    Raises:
      BadInput: see `write_once`.
    """
    if os.path.lexists(folder):
        try:
            return read(folder)
        except BadInput as e:
            say(f"data      {e}; it is made anew")
    write_once(folder, locks, write, read)
    return read(folder)


def write_once(
    folder: Path, locks: Path, write: Callable[[Path], None], read: Callable | None = None
) -> None:
    """Makes `folder` by `write(scratch)`, unless it is there; scratch takes its name when whole.

    Processes that want the same folder wait for one another; what a killed one left is removed.
    With `read`, what is there is replaced if `read(folder)` finds it damaged.

    Raises:
      BadInput: if nothing can be written there (no permission, disk full, a path below a file).
    """
    try:
        with _locked(
            locks / f"{hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]}", folder
        ) as exclusive:
            if (folder / META).exists() and (read is None or _reads(read, folder)):
                return
            if exclusive:
                for stale in folder.parent.glob(f".{folder.name}.*.tmp"):
                    shutil.rmtree(stale, ignore_errors=True)
            scratch = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}.tmp")
            try:
                scratch.mkdir(parents=True)
                write(scratch)
                if read is not None:
                    _remove(folder)
                try:
                    scratch.rename(folder)
                except OSError:  # on a file system without locks another host may have been first
                    if not (folder / META).exists():
                        raise
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as e:
        raise BadInput(f"cannot write {folder}: {e}") from e


def _reads(read: Callable, folder: Path) -> bool:
    try:
        read(folder)
    except BadInput:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(file: Path, folder: Path) -> Iterator[bool]:
    """Holds a lock on `file`; yields False where the file system has none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"data      waiting for another process that is writing {folder}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
