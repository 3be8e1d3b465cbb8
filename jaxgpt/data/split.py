"""Which documents are held out for validation."""

from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from jaxgpt.system.errors import BadInput
from jaxgpt.text.pieces import Documents, Piece, num_bytes


class Sizes(NamedTuple):
    """The size of each document, in UTF-8 bytes (or tokens), and of all in characters."""

    documents: array
    characters: int

    @property
    def total(self) -> int:
        """The size of all documents."""
        return sum(self.documents)


def measure(documents: Documents, source: str) -> Sizes:
    """Returns the sizes of a source's documents, all of which it reads. Raises `BadInput` if it
    holds no text."""
    sizes, characters = array("Q"), 0
    for piece in documents():
        if not piece.continues:
            sizes.append(0)
        sizes[-1] += num_bytes(piece.text) if piece.tokens is None else piece.length
        characters += piece.length
    if not sizes:
        raise BadInput(f"data source {source} is empty: it holds no text")
    return Sizes(sizes, characters)


def hold_out(
    documents: Documents, sizes: Sizes, fraction: float
) -> tuple[tuple[Documents, int], tuple[Documents, int]]:
    """Returns training and validation documents, both with their size: the last `fraction` of the
    bytes is held out.

    Whole documents, cut at the boundary nearest to the fraction, at least one on each side. A
    single document is cut at the first line that starts in its last `fraction`, else (no such
    line) at its last line, else (one line only) at the character.
    """
    if len(sizes.documents) == 1:
        cut, end = _line_near(documents(), sizes.characters, fraction), sizes.characters
        train_size, select = round(sizes.total * cut / end), _select_characters
    else:
        cut, end = _boundary(sizes.documents, fraction), len(sizes.documents)
        train_size, select = sum(sizes.documents[:cut]), _select_documents
    train = partial(select, documents, 0, cut)
    return (train, train_size), (partial(select, documents, cut, end), sizes.total - train_size)


def _boundary(sizes: array, fraction: float) -> int:
    target = (1 - fraction) * sum(sizes)
    distances = [abs(total - target) for total in accumulate(sizes[:-1])]
    return 1 + distances.index(min(distances))


def _select_documents(documents: Documents, first: int, end: int) -> Iterator[Piece]:
    number = -1
    for piece in documents():
        number += not piece.continues
        if number >= end:
            return
        if number >= first:
            yield piece


def _line_near(pieces: Iterable[Piece], total: int, fraction: float) -> int:
    """Returns the character at which to cut a single document of `total` characters."""
    cut = min(max(1, round(total * (1 - fraction))), total - 1)
    start, line_before = 0, 0
    for piece in pieces:
        if (newline := piece.text.rfind("\n", 0, max(cut - start, 0))) >= 0:
            line_before = start + newline + 1
        newline = piece.text.find("\n", max(cut - 1 - start, 0))
        if newline >= 0 and start + len(piece.text) > cut - 1:
            if start + newline + 1 < total:
                return start + newline + 1
            break
        start += piece.length
    return line_before or cut


def _select_characters(documents: Documents, first: int, end: int) -> Iterator[Piece]:
    """Yields characters (or tokens) `first` .. `end` - 1 of a single document."""
    start, continues = 0, False
    for piece in documents():
        selected = slice(max(first - start, 0), max(end - start, 0))
        start += piece.length
        tokens = None if piece.tokens is None else piece.tokens[selected]
        part = piece._replace(text=piece.text[selected], tokens=tokens, continues=continues)
        if part.length:
            yield part
            continues = True
