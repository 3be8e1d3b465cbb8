"""The corpus that every machine has: the Python standard library's own text."""

import hashlib
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.text.pieces import Piece

# Parts of the standard library that are not readable source: tests (17 MB, a language of their
# own), code-point tables, and bundled or generated files.
NOT_TEXT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings",
    "ensurepip", "pydoc_data", "lib2to3", "config",
}  # fmt: skip


def read_builtin() -> Iterator[Piece]:
    """Yields the Python standard library's source files and its reference topics.

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
            yield Piece(text, name)


def _left_out(path: Path) -> bool:
    return any(part in NOT_TEXT or part.startswith("config-") for part in path.parts)
