"""Documents as sources yield them, long ones in pieces."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxgpt.system.encoding import printable
from jaxgpt.system.errors import BadInput

# Longer documents come in pieces: no corpus need fit in memory, and SentencePiece takes less time
# for ten pieces than for one ten times as long.
PIECE_CHARS = 1 << 16
NEAR_END = 1 << 12
LONGEST_WHOLE = 1 << 28  # characters of a document that some step needs whole


class Span(NamedTuple):
    """A stretch of a document: plain text, or the name of one special token."""

    text: str
    is_target: bool = False  # whether the loss counts its tokens
    special: bool = False


class Piece(NamedTuple):
    """A document, or where `continues` is set, the next part of the one before."""

    text: str
    file: str = ""
    row: int = 0  # line or record of the file, from 1; 0 = the file is the document
    continues: bool = False
    tokens: np.ndarray | None = None  # where the source is tokenized already; text is then ""
    spans: tuple[Span, ...] = ()  # of the text, where not all of it is a target

    @property
    def where(self) -> str:
        """The document's name for people: its file and line or record."""
        return printable(f"{self.file}:{self.row}" if self.row else self.file)

    @property
    def length(self) -> int:
        """How many characters, or tokens where it is tokenized."""
        return len(self.text) if self.tokens is None else len(self.tokens)


Documents = Callable[[], Iterator[Piece]]  # each call reads the corpus anew, in the same order


def cut_at(text: str) -> int:
    """Returns the last position at which `text` may be cut so that its tokens stay the same, or 0.

    That is after a line break between two visible characters, else in front of a single space
    between two; near the end, else anywhere. Our SentencePiece models and GPT-2's pattern have no
    token that spans such a position.
    """
    for reach in (NEAR_END, len(text)):
        start = max(len(text) - reach, 1)
        for mark, kept in (("\n", 1), (" ", 0)):
            at = len(text) - 1
            while (at := text.rfind(mark, start, at)) > 0:
                if not text[at - 1].isspace() and not text[at + 1].isspace():
                    return at + kept
    return 0


def split_into_pieces(blocks: Iterable[str], file: str) -> Iterator[Piece]:
    """Yields one document, given as consecutive blocks of text, in pieces of about PIECE_CHARS.

    Text that `cut_at` would not cut is cut anywhere once it is 16 times as long.
    """
    text, continues = "", False
    for block in blocks:
        text, start = text + block, 0
        while len(text) - start > PIECE_CHARS and (length := _piece_length(text, start)):
            yield Piece(text[start : start + length], file, 0, continues)
            start, continues = start + length, True
        text = text[start:]
    if text:
        yield Piece(text, file, 0, continues)


def _piece_length(text: str, start: int) -> int:
    """Returns the length of the next piece of `text` from `start`, 0 if more text is needed."""
    for size in (PIECE_CHARS, 16 * PIECE_CHARS):
        if length := cut_at(text[start : start + size]):
            return length
    return 16 * PIECE_CHARS if len(text) - start > 16 * PIECE_CHARS else 0


def join_pieces(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yields whole documents, for steps that must see all of a document at once. Raises `BadInput`
    if one is longer than `LONGEST_WHOLE`; it is not read into memory."""
    document: list[Piece] = []
    size = 0
    for piece in pieces:
        if document and not piece.continues:
            yield _join(document)
            document, size = [], 0
        document.append(piece)
        if (size := size + len(piece.text)) > LONGEST_WHOLE:
            raise BadInput(
                f"{document[0].where} is a document of more than {LONGEST_WHOLE:,} characters,"
                " which data.clean and this tokenizer must see whole; split it into documents"
            )
    if document:
        yield _join(document)


def _join(pieces: list[Piece]) -> Piece:
    is_tokenized = pieces[0].tokens is not None
    tokens = np.concatenate([piece.tokens for piece in pieces]) if is_tokenized else None
    return pieces[0]._replace(text="".join(piece.text for piece in pieces), tokens=tokens)


def num_bytes(text: str) -> int:
    """Returns the length of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))
