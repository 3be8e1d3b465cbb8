"""A teacher's most likely tokens on disk: a file of records of one size, one for each chunk.

    meta.json      what the records were made from; its hash names the folder
    0.records      those of source 0: record c is that of chunk c

A record is `crc32` (uint32, of the chunk's number as 8 bytes and of the rest), `ids` [T, K] (uint16
or, where the vocabulary needs it, uint32) and `logs` [T, K] (float32), all little-endian. What was
never written, or only in part, has another checksum: so a killed run goes on where it was, and
damage is found.
"""

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

from jaxgpt.data.chunks import Chunks
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import write_whole


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one source, `count` in all. Raises `BadInput` where the disk is full."""

    path: Path
    count: int
    dtype: np.dtype

    @classmethod
    def open(cls, path: Path, count: int, seq_len: int, top_k: int, vocab_size: int) -> "Records":
        """Returns the records in a file, which is made if it is not there."""
        shape = (seq_len, top_k)
        id_type = "<u2" if vocab_size <= 1 << 16 else "<u4"
        fields = [("crc32", "<u4"), ("ids", id_type, shape), ("logs", "<f4", shape)]
        records = cls(path, count, np.dtype(fields))
        try:
            with open(path, "ab") as file:  # the system fills it with zeros, which take no room
                file.truncate(count * records.dtype.itemsize)
        except OSError as e:
            raise BadInput(f"cannot write {path}: {e}") from e
        return records

    def missing(self, chunks: np.ndarray) -> np.ndarray:
        """Returns those of `chunks` whose record is not there or damaged."""
        return np.array([c for c in chunks.tolist() if not self._is_whole(c)], np.int64)

    def read(self, chunks: np.ndarray) -> np.ndarray:
        """Returns the records of `chunks`. Raises `BadInput` if one is damaged or not there."""
        for chunk in chunks.tolist():
            if not self._is_whole(chunk):
                raise BadInput(
                    f"{self.path}: the record of chunk {chunk} is damaged or missing; run the same"
                    " command again, which makes it anew"
                )
        return self._all[chunks]

    def write(self, chunks: np.ndarray, ids: np.ndarray, logs: np.ndarray) -> None:
        """Writes the records of `chunks` from their `ids` and `logs`, [n, T, K]."""
        records = np.zeros(len(chunks), self.dtype)
        records["ids"], records["logs"] = ids, logs
        try:
            with open(self.path, "r+b") as file:  # a full disk is an error here, in a map a signal
                for chunk, record in zip(chunks.tolist(), records, strict=True):
                    record["crc32"] = _checksum(chunk, record)
                    file.seek(chunk * self.dtype.itemsize)
                    file.write(record.tobytes())
        except OSError as e:
            raise BadInput(f"cannot write {self.path}: {e}; make room, then run it again") from e

    @property
    def _all(self) -> np.ndarray:
        return np.memmap(self.path, self.dtype, "r", shape=(self.count,))

    def _is_whole(self, chunk: int) -> bool:
        record = self._all[chunk]
        return int(record["crc32"]) == _checksum(chunk, record)


def _checksum(chunk: int, record: np.void) -> int:
    return zlib.crc32(record.tobytes()[4:], zlib.crc32(chunk.to_bytes(8, "little")))


def records_folder(cache: Path, meta: dict) -> Path:
    """Returns the folder in `cache` of the records made from what `meta` says, and makes it."""
    text = json.dumps(meta, indent=2, sort_keys=True)
    folder = cache / "teachers" / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"cannot write {folder}: {e}") from e
    if not (folder / "meta.json").exists():
        write_whole(folder / "meta.json", text)
    return folder


@dataclasses.dataclass(frozen=True)
class TaughtChunks(Chunks):
    """Chunks with the teacher's most likely tokens for each of their positions."""

    chunks: Chunks
    records: Records

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def seq_len(self) -> int:
        """The length of a chunk."""
        return self.chunks.seq_len

    def read(self, chunks: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the chunks' arrays, and `teacher_ids` and `teacher_logs`, [n, T, K]."""
        records = self.records.read(chunks)
        ids = records["ids"].astype(np.int32)
        return self.chunks.read(chunks) | {"teacher_ids": ids, "teacher_logs": records["logs"]}

    def segments(self, chunk: int) -> list[tuple[int, int]]:
        """Returns the (start, length) in the stream of each document in the chunk."""
        return self.chunks.segments(chunk)

    def num_targets(self, chunks: np.ndarray) -> int:
        """Returns how many targets the chunks have together."""
        return self.chunks.num_targets(chunks)
