"""Pairs of texts for next sentence prediction (BERT, arXiv:1810.04805, appendix A.2).

    [CLS] a part of a document [SEP] what follows there, or a part of another document [SEP]
      0                          0   1                                                   1

A document is read in pieces as long as a row takes. A piece is cut in two after a random one of
its sentences or lines; in half of the rows the second part comes from another document, where
it begins at a sentence too.
"""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import numpy as np

from jaxgpt.data.chunks import Chunks
from jaxgpt.data.packing import count_up
from jaxgpt.denoising.draws import integers, uniforms

FOLLOWS, OTHER = 0, 1  # the labels, as in BERT's release
IS_OTHER, DOCUMENT, PLACE, CUT = range(8, 12)  # purposes of draws
SEPARATORS = 3
LOOK = 128  # tokens within which the other document's sentence begins


class Documents(NamedTuple):
    """The documents of one source that have two tokens or more: document d is `sizes[d]` tokens
    from token `starts[d]` of the source on, without its end-of-text."""

    starts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, starts: np.ndarray, end: int) -> "Documents":
        """Returns those whose end-of-text tokens stand at `starts`; the last ends at `end`."""
        first = starts.astype(np.int64) + 1
        sizes = np.append(first[1:] - 1, end) - first
        return cls(first[sizes > 1], sizes[sizes > 1])


@dataclasses.dataclass(frozen=True)
class PairChunks(Chunks):
    """The pieces of one source's documents, at most `room` tokens each; a rest of one token is left
    out. `tokens` are the source's."""

    tokens: np.ndarray
    documents: Documents
    seq_len: int

    @cached_property
    def pieces(self) -> np.ndarray:
        """The start, length and document of each piece, [pieces, 3]."""
        counts = -(-self.documents.sizes // self.room)
        offsets = self.room * count_up(counts)
        document = np.repeat(np.arange(len(counts)), counts)
        lengths = np.minimum(self.room, self.documents.sizes[document] - offsets)
        starts = self.documents.starts[document] + offsets
        return np.stack([starts, lengths, document], axis=1)[lengths > 1]

    @property
    def room(self) -> int:
        """How many tokens of a row are text."""
        return self.seq_len - SEPARATORS

    def __len__(self) -> int:
        return len(self.pieces)

    def read(self, chunks: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the pieces' `tokens` [n, room], 0 behind their end, and as `piece` [n, 3] where
        each starts, its length and its document."""
        piece = self.pieces[chunks]
        return {"tokens": window(self.tokens, piece[:, 0], piece[:, 1], self.room), "piece": piece}

    def segments(self, chunk: int) -> list[tuple[int, int]]:
        """Returns the (start, length) of the piece; a row's second text may be from elsewhere."""
        start, length, _ = self.pieces[chunk].tolist()
        return [(start, length)]


def window(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, room: int) -> np.ndarray:
    """Returns `lengths` tokens from `starts` on, 0 behind them; int32 [n, room]."""
    place = np.arange(room)
    inside = place < lengths[:, None]
    return np.where(inside, tokens[np.where(inside, starts[:, None] + place, 0)], 0).astype(
        np.int32
    )


class Frame(NamedTuple):
    """What stands around the texts: the ids of [CLS] and [SEP]; and of each id whether a sentence
    or a line ends with it."""

    cls: int
    sep: int
    is_break: np.ndarray


def pair_rows(
    arrays: dict[str, np.ndarray], source: PairChunks, frame: Frame, seed: int, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns `tokens`, `types`, `segments` and `is_text` [n, T], and `labels` [n], of what
    `source.read` gave. The source has two documents or more."""
    first, length, document = arrays["piece"].T
    tokens, room = arrays["tokens"], source.room
    cut = _cuts(frame.is_break[tokens], length, seed, rows)
    is_other = uniforms(seed, rows, 1, IS_OTHER)[:, 0] < 0.5
    left = length - cut
    other, offset = _elsewhere(source, document, left, frame.is_break, seed, rows)
    rest = np.where(is_other, np.minimum(left, source.documents.sizes[other] - offset), left)
    start = np.where(is_other, source.documents.starts[other] + offset, first + cut)
    second = window(source.tokens, start, rest, room)
    place = np.arange(source.seq_len)
    a_end, b_end = (cut + 1)[:, None], (cut + rest + 2)[:, None]  # where [SEP] stands
    of_first = np.take_along_axis(tokens, np.clip(place - 1, 0, room - 1)[None], axis=1)
    of_second = np.take_along_axis(second, np.clip(place - a_end - 1, 0, room - 1), axis=1)
    text = np.where(place < a_end, of_first, of_second)
    text = np.where(place == 0, frame.cls, text)
    text = np.where((place == a_end) | (place == b_end), frame.sep, text)
    return {
        "tokens": np.where(place <= b_end, text, 0).astype(np.int32),
        "types": ((place > a_end) & (place <= b_end)).astype(np.int32),
        "segments": (place <= b_end).astype(np.int32),
        "is_text": (place > 0) & (place < b_end) & (place != a_end),
        "labels": np.where(is_other, OTHER, FOLLOWS).astype(np.int32),
    }


def _cuts(is_break: np.ndarray, lengths: np.ndarray, seed: int, rows: np.ndarray) -> np.ndarray:
    """Returns how many tokens the first part has: up to a random break, else a random number."""
    draws = uniforms(seed, rows, is_break.shape[1], CUT)
    inside = np.arange(1, is_break.shape[1] + 1) < lengths[:, None]
    preferred = np.where(inside, draws + (is_break & inside), -1)
    return np.argmax(preferred, axis=1) + 1


def _elsewhere(
    source: PairChunks,
    document: np.ndarray,
    room: np.ndarray,
    is_break: np.ndarray,
    seed: int,
    rows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns another document than `document` and a token in it: the first one behind a break
    after a random place, or that place where no break is near. `room` tokens follow the place, or
    it is the document's start: how long the part is says little about where it is from."""
    starts, sizes = source.documents
    other = integers(seed, rows, 0, len(sizes) - 2, DOCUMENT)
    other += other >= document
    place = integers(seed, rows, 0, np.maximum(sizes[other] - room, 0), PLACE)
    following = np.minimum(sizes[other] - place - 1, LOOK)
    ahead = is_break[window(source.tokens, starts[other] + place, following, LOOK)]
    ahead &= np.arange(LOOK) < following[:, None]
    return other, np.where(ahead.any(1), place + np.argmax(ahead, axis=1) + 1, place)
