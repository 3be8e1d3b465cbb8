"""Tokens on disk: one folder per prepared corpus.

    meta.json         written last: {"format": 1, "dtype": "uint16", "vocab_size", "key",
                      "splits": {"train": {"tokens", "documents", "bytes", "blake2b"}, ...}}
    train.bin         token ids, little-endian, one end-of-text id in front of each document
    validation.bin
    tokenizer/        see `jaxgpt.tokenizer.save_tokenizer`

The folder is written under another name and renamed when whole, so it is there or it is not.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jaxgpt.config import BadInput
from jaxgpt.data.sources import Documents
from jaxgpt.tokenizer import Tokenizer

FORMAT = 1
META = "meta.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """One token stream and what evaluation must know of its text."""

    tokens: np.ndarray  # memory-mapped
    documents: int
    bytes: int  # UTF-8, without the end-of-text marks
    blake2b: str


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_split(folder: Path, name: str, documents: Documents, tokenizer: Tokenizer) -> dict:
    """Writes `name`.bin into `folder` and returns its entry in meta.json."""
    dtype, digest = token_dtype(tokenizer.vocab_size), hashlib.blake2b(digest_size=16)
    tokens = count = size = 0
    with open(folder / f"{name}.bin", "wb") as file:
        for text in documents():
            ids = np.concatenate([[tokenizer.end_of_text], tokenizer.encode(text)]).astype(dtype)
            file.write(raw := ids.tobytes())
            digest.update(raw)
            tokens, count, size = tokens + len(ids), count + 1, size + len(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    return {"tokens": tokens, "documents": count, "bytes": size, "blake2b": digest.hexdigest()}


def write_meta(folder: Path, vocab_size: int, key: str, splits: dict) -> None:
    """Writes meta.json, which declares the folder whole."""
    meta = {"format": FORMAT, "dtype": token_dtype(vocab_size).name, "vocab_size": vocab_size}
    (folder / META).write_text(json.dumps(meta | {"key": key, "splits": splits}, indent=2))


def read_meta(folder: Path) -> dict:
    """Returns the folder's meta.json.

    Raises:
      BadInput: if `folder` is not a prepared corpus or of another format.
    """
    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise BadInput(
            f"{folder} holds no token shards ({META}: {e}); write some with jaxgpt.prepare --out"
        ) from e
    if meta.get("format") != FORMAT:
        raise BadInput(f"{folder} has shard format {meta.get('format')}, not {FORMAT}; prepare again")
    return meta


def read_split(folder: Path, name: str) -> Split:
    """Returns a split, its tokens memory-mapped.

    Raises:
      BadInput: if the file is missing or not of the length that meta.json states.
    """
    meta = read_meta(folder)
    if name not in meta["splits"]:
        raise BadInput(f"{folder} has no split {name!r}, only {', '.join(meta['splits'])}")
    entry, file = meta["splits"][name], folder / f"{name}.bin"
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    if not file.is_file() or file.stat().st_size != entry["tokens"] * dtype.itemsize:
        raise BadInput(f"{file} is damaged: not {entry['tokens']} tokens; delete {folder}")
    tokens = np.memmap(file, dtype, mode="r")
    return Split(tokens, entry["documents"], entry["bytes"], entry["blake2b"])


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """Yields an empty sibling of `folder` that takes its name if the body succeeds.

    If another process got there first its folder stays and ours goes: both hold the same.

    Raises:
      BadInput: if nothing can be written there (no permission, disk full, a path below a file).
    """
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / META).exists():
                raise
    except OSError as e:
        raise BadInput(f"cannot write {folder}: {e}") from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
