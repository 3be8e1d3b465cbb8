"""What a source yields: documents, the long ones in pieces."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxgpt.system.encoding import printable
from jaxgpt.system.errors import BadInput

PIECE_CHARS = 1 << 16  # longer documents come in pieces: no corpus need fit in memory, and
# SentencePiece takes less time for ten pieces than for one ten times as long
NEAR_END = 1 << 12
LONGEST_WHOLE = 1 << 28  # characters of a document that some step must see whole


class Part(NamedTuple):
    """A stretch of a document: whether the loss counts it, or the name of one special token."""

    text: str
    learn: bool = False
    special: bool = False


class Piece(NamedTuple):
    """A document, or where `continues` is set, the next part of the one before."""

    text: str
    file: str = ""
    row: int = 0  # line or record of the file, from 1; 0 = the file is the document
    continues: bool = False
    tokens: np.ndarray | None = None  # where the source is tokenized already; text is then ""
    parts: tuple[Part, ...] = ()  # of text, where not all of it is learnt

    @property
    def where(self) -> str:
        """The document's name for people: its file and line or record."""
        return printable(f"{self.file}:{self.row}" if self.row else self.file)


Documents = Callable[[], Iterator[Piece]]  # each call reads the corpus anew, in the same order


def cut_at(text: str) -> int:
    """Returns the last place at which `text` may be cut so that its tokens stay the same, or 0.

    That is behind a line break between two visible characters, else before a single space
    between two; near the end, else anywhere. Our SentencePiece models and GPT-2's pattern never
    join what such a cut parts.
    """
    for reach in (NEAR_END, len(text)):
        start = max(len(text) - reach, 1)
        for mark, behind in (("\n", 1), (" ", 0)):
            at = len(text) - 1
            while (at := text.rfind(mark, start, at)) > 0:
                if not text[at - 1].isspace() and not text[at + 1].isspace():
                    return at + behind
    return 0


def in_pieces(chunks: Iterable[str], file: str) -> Iterator[Piece]:
    """Yields one document, given as consecutive chunks of text, in pieces of about PIECE_CHARS.

    Text without any place to cut is cut anyhow when it reaches 16 times that.
    """
    held, continues = "", False
    for chunk in chunks:
        held, start = held + chunk, 0
        while len(held) - start > PIECE_CHARS:
            place = _cut(held, start)
            if not place:
                break
            yield Piece(held[start : start + place], file, 0, continues)
            start, continues = start + place, True
        held = held[start:]
    if held:
        yield Piece(held, file, 0, continues)


def _cut(text: str, start: int) -> int:
    """Returns the length of the next piece of `text` from `start`, 0 if more text must come."""
    for size in (PIECE_CHARS, 16 * PIECE_CHARS):
        if place := cut_at(text[start : start + size]):
            return place
    return 16 * PIECE_CHARS if len(text) - start > 16 * PIECE_CHARS else 0


def whole(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yields the documents joined again, for what must see all of a document at once.

    Raises:
      BadInput: if one is longer than `LONGEST_WHOLE`, for which no memory is taken.
    """
    held: list[Piece] = []
    size = 0
    for piece in pieces:
        if held and not piece.continues:
            yield _joined(held)
            held, size = [], 0
        held.append(piece)
        if (size := size + len(piece.text)) > LONGEST_WHOLE:
            raise BadInput(
                f"{held[0].where} is a document of more than {LONGEST_WHOLE:,} characters, which"
                " data.clean and this tokenizer must see whole; split it into documents"
            )
    if held:
        yield _joined(held)


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    tokenized = pieces[0].tokens is not None
    tokens = np.concatenate([piece.tokens for piece in pieces]) if tokenized else None
    return pieces[0]._replace(text="".join(piece.text for piece in pieces), tokens=tokens)


def num_bytes(text: str) -> int:
    """Returns the length of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))
