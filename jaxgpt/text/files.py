"""Files by pattern, local or remote, opened through their compression, told apart by hash."""

import glob
import gzip
import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from jaxgpt.config import BadInput
from jaxgpt.config.extras import require
from jaxgpt.config.files import write_whole

BLOCK = 1 << 20
REMEMBERED = 16 << 20  # bytes from which on a file's hash is kept rather than computed anew
RACY_SECONDS = 2  # a file younger than this may still change within its time stamp


def expand(source: str, pattern: str) -> list[str]:
    """Returns the files that a glob, a folder (all below it) or a `scheme://` pattern names,
    sorted.

    Raises:
      BadInput: if there are none, or the remote file system is not installed or not reachable.
    """
    if "://" in pattern:
        return _expand_remote(source, pattern)
    local = Path(pattern).expanduser()
    pattern = str(local / "**" / "*") if local.is_dir() else str(local)
    paths = map(Path, glob.glob(pattern, recursive=True))
    if files := sorted(str(path) for path in paths if path.is_file()):
        return files
    raise BadInput(f"data source {source}: no file matches {pattern}")


def _expand_remote(source: str, pattern: str) -> list[str]:
    fsspec = require("fsspec", "data", f"data source {source}")
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        found = fs.glob(f"{path}/**") if fs.isdir(path) else fs.glob(path)
        files = sorted(fs.unstrip_protocol(f) for f in found if fs.isfile(f))
    except Exception as e:  # each file system raises its own
        raise BadInput(f"data source {source} cannot be listed: {e}") from e
    if not files:
        raise BadInput(f"data source {source}: no file matches {pattern}")
    return files


@contextmanager
def opened(file: str, decompress: bool = True) -> Iterator[BinaryIO]:
    """Yields `file` as a binary stream, decompressed if it ends in `.gz` or `.zst`.

    Raises:
      BadInput: wherever the file turns out to be unreadable or damaged, while reading too.
    """
    try:
        remote = "://" in file
        with (
            require("fsspec", "data", file).open(file, "rb") if remote else open(file, "rb") as raw
        ):
            if decompress and file.endswith(".gz"):
                yield gzip.GzipFile(fileobj=raw)
            elif decompress and file.endswith(".zst"):
                zstandard = require("zstandard", "data", f"reading {file}")
                yield io.BufferedReader(_Zstd(raw, zstandard), BLOCK)
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as e:
        raise BadInput(f"{file} cannot be read: {e}") from e


class _Zstd(io.RawIOBase):
    """The decompressed bytes of a zstd stream; unlike the library's reader, it minds a missing
    end."""

    def __init__(self, raw: BinaryIO, library):
        self.raw, self.library = raw, library
        self.frame, self.rest = None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.rest:
            if not (block := self.raw.read(BLOCK)):
                if self.frame:
                    raise EOFError("the zstd stream ends too early")
                return 0
            self.rest = b"".join(self._decompress(block))
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count

    def _decompress(self, block: bytes) -> Iterator[bytes]:
        while block:
            self.frame = self.frame or self.library.ZstdDecompressor().decompressobj()
            try:
                yield self.frame.decompress(block)
            except self.library.ZstdError as e:
                raise OSError(str(e)) from e
            block = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame


def blocks(file: str) -> Iterator[bytes]:
    """Yields the decompressed bytes of `file`, at most BLOCK at a time."""
    with opened(file) as stream:
        while block := stream.read(BLOCK):
            yield block


def digest(files: list[str], memory: Path) -> str:
    """Returns a hash of the files' bytes, in order; their names do not matter.

    Hashes of large local files are remembered in `memory` by path, size and time stamp.
    """
    known = _recall(memory)
    total, learnt = hashlib.sha256(), {}
    for file in files:
        stamp = None
        if "://" not in file and os.path.getsize(file) >= REMEMBERED:
            status = os.stat(file)
            stamp = [status.st_size, status.st_mtime_ns]
        name = os.path.abspath(file) if stamp else file
        if stamp and known.get(name, [None])[0] == stamp:
            total.update(bytes.fromhex(known[name][1]))
            continue
        one = hashlib.sha256()
        with opened(file, decompress=False) as stream:
            while block := stream.read(BLOCK):
                one.update(block)
        total.update(one.digest())
        if stamp and time.time() - stamp[1] / 1e9 > RACY_SECONDS:
            learnt[name] = [stamp, one.hexdigest()]
    if learnt:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memory, json.dumps(_recall(memory) | learnt))
    return total.hexdigest()


def _recall(memory: Path) -> dict:
    try:
        return json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
