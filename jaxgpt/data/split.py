"""Which documents are held out for validation."""

import dataclasses
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jaxgpt.system.errors import BadInput
from jaxgpt.text.pieces import Documents, Piece, num_bytes


class Part(NamedTuple):
    """Documents of one split and their size in bytes (tokens, where the source is tokenized)."""

    documents: Documents
    size: int


@dataclasses.dataclass(frozen=True)
class Scan:
    """The size of each document, in UTF-8 bytes (or tokens), and of all in characters."""

    sizes: array
    characters: int


def scan(documents: Documents, source: str) -> Scan:
    """Reads a corpus once.

    Raises:
      BadInput: if it holds no text.
    """
    sizes, characters = array("Q"), 0
    for piece in documents():
        if not piece.continues:
            sizes.append(0)
        sizes[-1] += num_bytes(piece.text) if piece.tokens is None else len(piece.tokens)
        characters += _length(piece)
    if not sizes:
        raise BadInput(f"data source {source} is empty: it holds no text")
    return Scan(sizes, characters)


def hold_out(documents: Documents, found: Scan, fraction: float) -> tuple[Part, Part]:
    """Returns the (train, validation) parts: the last `fraction` of the bytes is held out.

    Whole documents, cut at the boundary nearest to the fraction, at least one on each side. A
    single document is cut at the first line that starts in its last `fraction`, else (no such
    line) at its last line, else (one line only) at the character.
    """
    total = sum(found.sizes)
    if len(found.sizes) == 1:
        cut = _line_near(documents(), found.characters, fraction)
        train, validation = (0, cut), (cut, found.characters)
        size = round(total * cut / found.characters)
        select = _span
    else:
        cut = _boundary(found.sizes, fraction)
        train, validation = (0, cut), (cut, len(found.sizes))
        size, select = sum(found.sizes[:cut]), _documents
    return (
        Part(lambda: select(documents(), *train), size),
        Part(lambda: select(documents(), *validation), total - size),
    )


def _length(piece: Piece) -> int:
    return len(piece.text) if piece.tokens is None else len(piece.tokens)


def _boundary(sizes: array, fraction: float) -> int:
    target, total, best = (1 - fraction) * sum(sizes), 0, (float("inf"), 1)
    for i, size in enumerate(sizes[:-1], start=1):
        total += size
        best = min(best, (abs(total - target), i))
    return best[1]


def _documents(pieces: Iterable[Piece], first: int, end: int) -> Iterator[Piece]:
    number = -1
    for piece in pieces:
        number += not piece.continues
        if number >= end:
            return
        if number >= first:
            yield piece


def _line_near(pieces: Iterable[Piece], total: int, fraction: float) -> int:
    """Returns the character at which to cut a single document of `total` characters."""
    cut = min(max(1, round(total * (1 - fraction))), total - 1)
    start, before = 0, 0
    for piece in pieces:
        if (line := piece.text.rfind("\n", 0, max(cut - start, 0))) >= 0:
            before = start + line + 1
        behind = piece.text.find("\n", max(cut - 1 - start, 0))
        if behind >= 0 and start + len(piece.text) > cut - 1:
            if start + behind + 1 < total:
                return start + behind + 1
            break
        start += _length(piece)
    return before or cut


def _span(pieces: Iterable[Piece], first: int, end: int) -> Iterator[Piece]:
    """Yields characters (or tokens) `first` .. `end` - 1 of a single document."""
    start, continues = 0, False
    for piece in pieces:
        inside = slice(max(first - start, 0), max(end - start, 0))
        start += _length(piece)
        tokens = None if piece.tokens is None else piece.tokens[inside]
        part = piece._replace(text=piece.text[inside], tokens=tokens, continues=continues)
        if _length(part):
            yield part
            continues = True
