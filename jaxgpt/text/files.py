"""Input files: listed by pattern, local or remote, opened through their compression, and hashed."""

import functools
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
from jaxgpt.system.errors import BadInput, as_bad_input
from jaxgpt.system.extras import require
from jaxgpt.system.files import Damaged, Missing, read_json, write_whole

BLOCK = 1 << 20
LONGEST = 1 << 28  # bytes of one line or record: a longer one is damaged, or not text
REMEMBERED = 16 << 20  # bytes from which on a file's hash is kept rather than computed anew
RACY_SECONDS = 2  # a file younger than this may still change within its time stamp


def list_files(source: str, pattern: str, remedy: str = "") -> list[str]:
    """Returns the files, sorted, that a glob, a folder (all below) or a `scheme://` pattern names.

    A file that several links lead to is listed once, under the first of its names. `remedy` ends
    the message if there are none.

    Raises:
      BadInput: if there are none, or they cannot be listed (no permission; a remote file system
        that is not installed or not reachable).
    """
    with as_bad_input(lambda e: f"data source {source} cannot be listed: {e}"):
        files = _list_remote(source, pattern) if "://" in pattern else _list_local(pattern)
    if not files:
        raise BadInput(f"data source {source}: no file matches {pattern}{remedy}")
    return files


def _list_remote(source: str, pattern: str) -> list[str]:
    fs, path = require("fsspec", "data", f"data source {source}").core.url_to_fs(pattern)
    names = fs.glob(f"{path}/**") if fs.isdir(path) else fs.glob(path)
    return sorted(fs.unstrip_protocol(name) for name in names if fs.isfile(name))


def _list_local(pattern: str) -> list[str]:
    pattern = str(Path(pattern).expanduser())
    parts = [*pattern.split("/"), *(["**"] if os.path.isdir(pattern) else [])]
    if "**" in parts:  # `glob` would follow links that lead back for ever
        at = parts.index("**")
        start, rest = "/".join([*parts[:at], ""]), [part for part in parts[at:] if part]
        files = [
            file
            for folder in (glob.glob(start) if start else [""])
            for file in _files_below(folder, set())
            if _matches(file[len(folder) :].split("/"), rest)
        ]
    else:
        files = [file for file in glob.glob(pattern) if os.path.isfile(file)]
    by_target = {os.path.realpath(file): file for file in sorted(files, reverse=True)}
    return sorted(by_target.values())


def _files_below(folder: str, seen: set) -> Iterator[str]:
    """Yields the files below `folder`; follows links, but enters no folder twice."""
    status = os.stat(folder or ".")
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder or ".") as entries:
        names = sorted((entry.is_symlink(), entry.name) for entry in entries)  # links last
    for _, name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _files_below(path, seen)
        elif os.path.isfile(path):
            yield path


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Says whether a path matches, by `glob`'s rules: no wildcard matches a leading dot."""

    @functools.cache  # each pair of positions is compared once: no exponential backtracking
    def match(part: int, at: int) -> bool:
        """Says whether the path from `part` on matches the pattern from `at` on."""
        if at == len(pattern):
            return part == len(parts)
        if pattern[at] == "**" and match(part, at + 1):  # `**` may match nothing
            return True
        if part == len(parts):
            return False
        hidden = parts[part].startswith(".")
        if pattern[at] == "**":
            return not hidden and match(part + 1, at)
        if hidden and not pattern[at].startswith("."):
            return False
        return fnmatchcase(parts[part], pattern[at]) and match(part + 1, at + 1)

    return match(0, 0)


@contextmanager
def open_file(file: str, decompress: bool = True) -> Iterator[BinaryIO]:
    """Yields `file` as a binary stream, decompressed if it ends in `.gz` or `.zst`. Raises
    `BadInput` if the file is unreadable or damaged, also where that shows while reading."""
    # remote file systems raise exceptions of their own
    errors = Exception if "://" in file else (OSError, EOFError, zlib.error)
    opener = require("fsspec", "data", file).open if "://" in file else open
    try:
        with opener(file, "rb") as raw:
            if decompress and file.endswith(".gz"):
                yield gzip.GzipFile(fileobj=raw)
            elif decompress and file.endswith(".zst"):
                arrow = require("pyarrow", "data", f"reading {file}")
                stream = arrow.CompressedInputStream(arrow.PythonFile(raw, "r"), "zstd")
                yield io.BufferedReader(stream, BLOCK)
            else:
                yield raw
    except BadInput:
        raise
    except errors as e:
        raise BadInput(f"{file} cannot be read: {e}") from e


def read_lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) of every line of `file` that is not blank.

    Only a line feed ends a line: JSON texts may hold U+2028 and the like.

    Raises:
      BadInput: if a line is longer than `LONGEST`; it is not read into memory.
    """
    with open_file(file) as stream:
        lines = iter(lambda: stream.readline(LONGEST + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > LONGEST:
                raise BadInput(f"{file}, line {number} is longer than {LONGEST:,} bytes")
            if line.strip():
                yield number, line


def local_stamp(file: os.PathLike | str) -> list[int]:
    """Returns what differs once a local file is written to or replaced: size, modification time,
    change time (which nobody can set back) and inode."""
    status = os.stat(file)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def file_stamp(file: str) -> list:
    """Returns `local_stamp`, or for a remote file what its file system gives for that purpose.
    Raises `BadInput` if the file is gone."""
    with as_bad_input(lambda e: f"{file} cannot be read: {e}"):
        if "://" not in file:
            return local_stamp(file)
        fs, path = require("fsspec", "data", file).core.url_to_fs(file)
        fs.invalidate_cache()
        return [fs.ukey(path)]


def is_young(stamp: list) -> bool:
    """Says whether a file was written so recently that a further change could leave its stamp."""
    return len(stamp) > 1 and time.time() - max(stamp[1:3]) / 1e9 < RACY_SECONDS


def hash_files(files: list[str], memory: Path) -> str:
    """Returns a hash of the files' bytes, in order; their names do not matter.

    Hashes of large local files are kept in the file `memory`, by path and stamp.
    """
    known, new = _read_memory(memory), {}
    total = hashlib.sha256()
    for file in files:
        name = printable(os.path.abspath(file))
        stamp = None if "://" in file else file_stamp(file)
        is_kept = stamp and stamp[0] >= REMEMBERED and not is_young(stamp)
        if is_kept and known.get(name, [None])[0] == stamp:
            total.update(bytes.fromhex(known[name][1]))
            continue
        with open_file(file, decompress=False) as stream:
            file_hash = hashlib.file_digest(stream, "sha256")
        total.update(file_hash.digest())
        if is_kept:
            new[name] = [stamp, file_hash.hexdigest()]
    if new:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memory, json.dumps(_read_memory(memory) | new))
    return total.hexdigest()


def _read_memory(memory: Path) -> dict:
    """Returns the hashes that are kept; none if they are damaged: the files are then read again."""
    try:
        hashes = read_json(memory, {str: ([int], str)})
        for _, file_hash in hashes.values():
            bytes.fromhex(file_hash)
        return hashes
    except Missing:
        return {}
    except (Damaged, ValueError) as e:
        say(f"data      {memory} is damaged; its hashes are computed again ({e})")
        return {}
