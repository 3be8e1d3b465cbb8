"""`data.source` strings to documents: `builtin`, `text:GLOB`, `jsonl:GLOB`."""

import functools
import glob
import gzip
import hashlib
import importlib
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxgpt.config import BadInput

Documents = Callable[[], Iterator[str]]  # each call reads the corpus anew, in the same order

# Parts of the standard library that are not readable source: tests (17 MB, a language of their
# own), code-point tables, and bundled or generated files.
NOT_TEXT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings",
    "ensurepip", "pydoc_data", "lib2to3", "config",
}  # fmt: skip


def open_source(source: str, field: str = "text") -> Documents:
    """Returns the documents of `source`; empty ones are passed over.

    Raises:
      BadInput: now, if the source is unknown or no file matches; while reading, if a file is not
        UTF-8 or a jsonl line is broken or lacks `field` (file and line are named).
    """
    kind, _, argument = source.partition(":")
    if source == "builtin":
        return _builtin
    if kind == "text" and argument:
        return functools.partial(_text, _files(source, argument))
    if kind == "jsonl" and argument:
        return functools.partial(_jsonl, _files(source, argument), field)
    raise BadInput(
        f"data source {source!r} is unknown: choose builtin, text:GLOB, jsonl:GLOB or shards:DIR"
    )


def _files(source: str, pattern: str) -> list[Path]:
    paths = map(Path, glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = sorted(path for path in paths if path.is_file())
    if not files:
        raise BadInput(f"data source {source}: no file matches {pattern}")
    return files


def _text(files: list[Path]) -> Iterator[str]:
    for file in files:
        if text := _decode(_read(file), file):
            yield text


def _jsonl(files: list[Path], field: str) -> Iterator[str]:
    for file in files:
        for number, line in enumerate(_read(file).split(b"\n"), start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(_decode(line, where))
            except json.JSONDecodeError as e:
                raise BadInput(f"{where} is not valid JSON: {e}") from e
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                has = f"its fields are {', '.join(row)}" if isinstance(row, dict) else "not an object"
                raise BadInput(f"{where} has no text field {field!r} ({has}); set data.field")
            _check_encodable(text, where)
            if text:
                yield text


def _read(file: Path) -> bytes:
    try:
        raw = file.read_bytes()
        return gzip.decompress(raw) if file.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as e:
        raise BadInput(f"{file} cannot be read: {e}") from e


def _decode(raw: bytes, where) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise BadInput(
            f"{where} is not UTF-8 (byte {e.start}: 0x{raw[e.start]:02x}); convert it first,"
            " for example with iconv -f latin1 -t utf-8"
        ) from e


def _check_encodable(text: str, where: str) -> None:
    """JSON may spell half a surrogate pair, which no UTF-8 text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise BadInput(f"{where} holds an unpaired surrogate \\u{ord(text[e.start]):04x}") from e


def _builtin() -> Iterator[str]:
    """The Python standard library's source files and its reference topics.

    They come in the order of their names' hashes, so that the held-out tail is like the rest.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    files = {f"lib/{path.as_posix()}": path for path in files if not _left_out(path)}
    topics = importlib.import_module("pydoc_data.topics").topics
    names = sorted([*files, *topics], key=lambda n: hashlib.sha256(n.encode()).digest())
    for name in names:
        if name in files:
            text = (root / files[name]).read_bytes().decode("utf-8", errors="ignore")
        else:
            text = topics[name]
        if text.strip():
            yield text


def _left_out(path: Path) -> bool:
    return any(part in NOT_TEXT or part.startswith("config-") for part in path.parts)
