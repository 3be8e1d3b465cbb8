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
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from jaxgpt.system.console import say
from jaxgpt.system.encoding import printable
from jaxgpt.system.errors import BadInput
from jaxgpt.system.extras import require
from jaxgpt.system.files import Damaged, Missing, read_json, write_whole

BLOCK = 1 << 20
ZSTD_BLOCK = 1 << 12  # of compressed bytes: at most 128 MB of zeros come out of it at once
LONGEST = 1 << 28  # bytes of one line or record: what is longer is damage, or no text
REMEMBERED = 16 << 20  # bytes from which on a file's hash is kept rather than computed anew
RACY_SECONDS = 2  # a file younger than this may still change within its time stamp


def expand(source: str, pattern: str) -> list[str]:
    """Returns the files, sorted, that a glob, a folder (all below) or a `scheme://` pattern names.

    A file that several links lead to is listed once, by its first name.

    Raises:
      BadInput: if there are none, or they cannot be listed (no permission; a remote file system
        that is not installed or not reachable).
    """
    if "://" in pattern:
        return _expand_remote(source, pattern)
    try:
        found = _expand_local(str(Path(pattern).expanduser()))
    except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: ~nobody
        raise BadInput(f"data source {source} cannot be listed: {e}") from e
    files = {os.path.realpath(file): file for file in sorted(found, reverse=True)}
    if not files:
        raise BadInput(f"data source {source}: no file matches {pattern}")
    return sorted(files.values())


def _expand_local(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        pattern = os.path.join(pattern, "**")
    parts = pattern.split("/")
    if "**" not in parts:
        return [file for file in glob.glob(pattern) if os.path.isfile(file)]
    at = parts.index("**")
    start, wanted = "/".join([*parts[:at], ""]), [part for part in parts[at:] if part]
    found = []
    for folder in glob.glob(start) if start else [""]:
        below = ((file, file[len(folder) :].split("/")) for file in _below(folder, set()))
        found += [file for file, inner in below if _matches(inner, wanted)]
    return found


def _below(folder: str, seen: set) -> Iterator[str]:
    """Yields the files below `folder`; follows links, but enters no folder twice."""
    status = os.stat(folder or ".")
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder or ".") as entries:
        names = sorted((entry.is_symlink(), entry.name) for entry in entries)
    for _, name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _below(path, seen)
        elif os.path.isfile(path):
            yield path


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Says whether a path matches, by `glob`'s rules: no wildcard stands for a leading dot.

    Holds the set of places in the pattern that the parts so far lead to: no backtracking.
    """
    places = _with_next({0}, pattern)
    for part in parts:
        hidden, reached = part.startswith("."), set()
        for at in (at for at in places if at < len(pattern)):
            if pattern[at] == "**":
                reached |= set() if hidden else {at}
            elif (not hidden or pattern[at].startswith(".")) and fnmatchcase(part, pattern[at]):
                reached.add(at + 1)
        places = _with_next(reached, pattern)
    return len(pattern) in places


def _with_next(places: set[int], pattern: list[str]) -> set[int]:
    """Adds the places behind each `**`, which may stand for nothing."""
    found = set()
    for at in places:
        found.add(at)
        while at < len(pattern) and pattern[at] == "**":
            found.add(at := at + 1)
    return found


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
    remote = "://" in file
    try:
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
    except BadInput:
        raise
    except Exception as e:
        if remote or isinstance(e, OSError | EOFError | zlib.error):  # remote ones raise their own
            raise BadInput(f"{file} cannot be read: {e}") from e
        raise


class _Zstd(io.RawIOBase):
    """The decompressed bytes of a zstd stream, whose missing end the library's reader overlooks."""

    def __init__(self, raw: BinaryIO, library):
        self.raw, self.library = raw, library
        self.frame, self.rest = None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.rest:
            if not (block := self.raw.read(ZSTD_BLOCK)):
                if self.frame:
                    raise EOFError("the zstd stream ends too early")
                return 0
            self.rest = memoryview(b"".join(self._decompress(block)))
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


def lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) of every line of `file` that is not blank.

    Lines end with a line feed alone: JSON texts may hold U+2028 and the like.

    Raises:
      BadInput: if one is longer than `LONGEST`, for which no memory is taken.
    """
    with opened(file) as stream:
        number = 0
        while line := stream.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise BadInput(f"{file}, line {number} is longer than {LONGEST:,} bytes")
            if line.strip():
                yield number, line


def stamps(files: list[str]) -> list[list]:
    """Returns for each file what changes when it is written to or replaced: its size, times and
    inode (the times of any change too, which nobody can set back); of a remote one, what its file
    system tells.

    Raises:
      BadInput: if one is gone.
    """
    try:
        return [_remote_stamp(file) if "://" in file else stamp_of(file) for file in files]
    except OSError as e:
        raise BadInput(f"a source cannot be read: {e}") from e


def stamp_of(file: os.PathLike | str) -> list[int]:
    """Returns a local file's stamp (see `stamps`): size, modification, change, inode."""
    status = os.stat(file)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _remote_stamp(file: str) -> list[str]:
    try:
        fs, path = require("fsspec", "data", file).core.url_to_fs(file)
        fs.invalidate_cache()
        return [fs.ukey(path)]
    except Exception as e:  # each file system raises its own
        raise BadInput(f"{file} cannot be read: {e}") from e


def is_young(stamp: list) -> bool:
    """Says whether a file was written so recently that a further change could leave its stamp."""
    return len(stamp) > 1 and time.time() - max(stamp[1:3]) / 1e9 < RACY_SECONDS


def digest(files: list[str], memory: Path) -> str:
    """Returns a hash of the files' bytes, in order; their names do not matter.

    Hashes of large local files are remembered in `memory` by path and stamp.
    """
    known = _recall(memory)
    total, learnt = hashlib.sha256(), {}
    for file in files:
        stamp = None if "://" in file else stamps([file])[0]
        name = printable(os.path.abspath(file))
        if stamp and known.get(name, [None])[0] == stamp and not is_young(stamp):
            total.update(bytes.fromhex(known[name][1]))
            continue
        one = hashlib.sha256()
        with opened(file, decompress=False) as stream:
            while block := stream.read(BLOCK):
                one.update(block)
        total.update(one.digest())
        if stamp and stamp[0] >= REMEMBERED and not is_young(stamp):
            learnt[name] = [stamp, one.hexdigest()]
    if learnt:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memory, json.dumps(_recall(memory) | learnt))
    return total.hexdigest()


def _recall(memory: Path) -> dict:
    """Returns the remembered hashes; none if they are damaged, which costs reading the files."""
    try:
        known = read_json(memory, {str: ([int], str)})
        for _, found in known.values():
            bytes.fromhex(found)
        return known
    except Missing:
        return {}
    except (Damaged, ValueError) as e:
        say(f"data      {memory} is damaged and begun anew ({e})")
        return {}
