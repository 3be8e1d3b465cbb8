"""What a source yields: documents, the long ones in pieces."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

PIECE_CHARS = 1 << 20  # longer documents come in pieces, so that no corpus need fit in memory
SAFE_LINE = re.compile(r"(?<=\S)\n(?=\S)")
SAFE_WORD = re.compile(r"(?<=\S)(?= \S)")


class Piece(NamedTuple):
    """A document, or where `continues` is set, the next part of the one before."""

    text: str
    file: str = ""
    row: int = 0  # line or record of the file, from 1; 0 = the file is the document
    continues: bool = False
    tokens: np.ndarray | None = None  # where the source is tokenized already; text is then ""

    @property
    def where(self) -> str:
        """The document's name for people: its file and line or record."""
        return f"{self.file}:{self.row}" if self.row else self.file


Documents = Callable[[], Iterator[Piece]]  # each call reads the corpus anew, in the same order


def cut_at(text: str) -> int:
    """Returns the last place at which `text` may be cut so that its tokens stay the same, or 0.

    That is behind a line break between two visible characters, else before a single space
    between two. Our SentencePiece models and GPT-2's pattern never join what such a cut parts.
    """
    for pattern in (SAFE_LINE, SAFE_WORD):
        place = max((m.end() for m in pattern.finditer(text, max(0, len(text) - 65536))), default=0)
        if place:
            return place
    return max((m.end() for m in SAFE_LINE.finditer(text)), default=0)


def in_pieces(chunks: Iterable[str], file: str) -> Iterator[Piece]:
    """Yields one document, given as consecutive chunks of text, in pieces of about PIECE_CHARS.

    Text without any place to cut is cut anyhow when it reaches 16 times that.
    """
    held, continues = "", False
    for chunk in chunks:
        held += chunk
        while len(held) > PIECE_CHARS:
            place = cut_at(held) or (len(held) if len(held) > 16 * PIECE_CHARS else 0)
            if not place:
                break
            yield Piece(held[:place], file, 0, continues)
            held, continues = held[place:], True
    if held:
        yield Piece(held, file, 0, continues)


def whole(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yields the documents joined again, for what must see all of a document at once."""
    held: list[Piece] = []
    for piece in pieces:
        if held and not piece.continues:
            yield _joined(held)
            held = []
        held.append(piece)
    if held:
        yield _joined(held)


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    return pieces[0]._replace(text="".join(piece.text for piece in pieces))


def num_bytes(text: str) -> int:
    """Returns the length of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))
