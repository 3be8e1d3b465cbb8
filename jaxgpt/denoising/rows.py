"""Rows of batches from chunks of tokens: each objective's `Rows`, and the chunks that they read."""

import abc
import dataclasses
from typing import NamedTuple

import numpy as np

from jaxgpt.config.schema import IGNORE
from jaxgpt.data.chunks import Chunks, next_token
from jaxgpt.data.pipeline import Stream
from jaxgpt.denoising.masked import Masking, choose, mask_tokens
from jaxgpt.denoising.middle import Middle, move_middles
from jaxgpt.denoising.pairs import Frame, PairChunks, pair_rows
from jaxgpt.denoising.prefix import split_rows
from jaxgpt.denoising.spans import Lengths, corrupt_spans, noise_mask
from jaxgpt.denoising.words import Words

Arrays = dict[str, np.ndarray]


class RowMaker(abc.ABC):
    """What makes rows of chunks."""

    @abc.abstractmethod
    def __call__(self, chunks: Chunks, which: np.ndarray, seed: int, rows: np.ndarray) -> Arrays:
        """Returns the arrays of the chunks `which`, drawn for the numbers `rows`."""

    def num_targets(self, chunks: Chunks, which: np.ndarray, seed: int, rows: np.ndarray) -> int:
        """Returns how many targets those have together."""
        return int(np.count_nonzero(self(chunks, which, seed, rows)["targets"] != IGNORE))


class Rows(NamedTuple):
    """How rows are made: by `make`, of chunks of `chunk_len` tokens."""

    chunk_len: int
    make: RowMaker


@dataclasses.dataclass(frozen=True)
class Corrupted(Chunks):
    """Chunks as rows. A row is read by its chunk and its number, from which it is drawn."""

    chunks: Chunks
    rows: Rows
    seed: int

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def seq_len(self) -> int:
        """How many tokens a chunk has."""
        return self.rows.chunk_len

    def read(self, numbered: np.ndarray) -> Arrays:
        """Returns the arrays of rows [n, 2], each a chunk and a number."""
        return self.rows.make(self.chunks, numbered[:, 0], self.seed, numbered[:, 1])

    def num_targets(self, numbered: np.ndarray) -> int:
        """Returns how many targets the rows have together."""
        return self.rows.make.num_targets(self.chunks, numbered[:, 0], self.seed, numbered[:, 1])

    def segments(self, chunk: int) -> list[tuple[int, int]]:
        """Returns the (start, length) of what a chunk is of."""
        return self.chunks.segments(chunk)


class NumberedStream(Stream):
    """A stream whose chunks are `Corrupted`: an example's number in the endless sequence goes with
    its chunk, so that it is drawn anew in each epoch and alike on any number of hosts."""

    def chunks(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (source, [chunk, number]) of the examples at `indices`."""
        source, chunk = super().chunks(indices)
        return source, np.stack([chunk, indices.ravel()], axis=1)


@dataclasses.dataclass(frozen=True)
class Windows(Chunks):
    """The windows of a split that evaluation reads: one after the other, all tokens once. The last
    is padded, in segment 0, or where only `whole` ones are asked for left out."""

    tokens: np.ndarray
    seq_len: int
    whole: bool = False

    def __len__(self) -> int:
        rest = 0 if self.whole else self.seq_len - 1
        return (len(self.tokens) + rest) // self.seq_len

    def read(self, chunks: np.ndarray) -> Arrays:
        """Returns `inputs`, `targets` and `segments`, int32 [n, T]."""
        position = chunks[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        inside = position < len(self.tokens)
        tokens = np.where(inside, self.tokens[np.where(inside, position, 0)], 0).astype(np.int32)
        segments = inside[:, :-1].astype(np.int32)
        return next_token(tokens, inside[:, 1:]) | {"segments": segments}


class Around(NamedTuple):
    """The special tokens in front of a text and behind it."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def __call__(self, tokens: np.ndarray, filled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows [n, T] of `tokens`, of which each row has `filled` and 0 behind them;
        and which are text."""
        before, length = len(self.before), tokens.shape[1]
        extra = before + len(self.after)
        row = np.zeros((len(tokens), length + extra), np.int32)
        row[:, :before], row[:, before : before + length] = self.before, tokens
        place = np.arange(length + extra)
        is_text = (place >= before) & (place < before + filled[:, None])
        for number, token in enumerate(self.after):
            np.put_along_axis(row, (before + filled + number)[:, None], token, axis=1)
        return row, is_text


@dataclasses.dataclass(frozen=True)
class MaskedRows(RowMaker):
    """Makes rows of masked language modelling: framed by `around`, or packed, where each document
    begins with the first of its tokens instead of end-of-text."""

    around: Around
    masking: Masking
    is_special: np.ndarray  # of each id: whether it is never chosen
    words: Words | None  # None = tokens are chosen one by one
    end_of_text: int

    def __call__(self, chunks: Chunks, which: np.ndarray, seed: int, rows: np.ndarray) -> Arrays:
        arrays, is_text = self.framed(chunks, which)
        return arrays | self.masked(arrays["inputs"], is_text, seed, rows)

    def framed(self, chunks: Chunks, which: np.ndarray) -> tuple[Arrays, np.ndarray]:
        """Returns the rows before anything is masked, and which of their tokens are text."""
        arrays = chunks.read(which)
        if "positions" in arrays:
            tokens, first = arrays["inputs"], (*self.around.before, self.end_of_text)[0]
            arrays["inputs"] = np.where(tokens == self.end_of_text, first, tokens)
            return arrays, arrays["segments"] > 0
        filled = arrays.get("segments", np.ones_like(arrays["inputs"])).sum(1)
        tokens, is_text = self.around(arrays["inputs"], filled)
        if "segments" not in arrays:
            return {"inputs": tokens}, is_text
        ends = filled + len(self.around.before) + len(self.around.after)
        is_filled = np.arange(tokens.shape[1]) < ends[:, None]
        return {"inputs": tokens, "segments": is_filled.astype(np.int32)}, is_text

    def masked(
        self, tokens: np.ndarray, is_text: np.ndarray, seed: int, rows: np.ndarray
    ) -> Arrays:
        """Returns `inputs` and `targets` of `tokens` [n, T], some of those that are text masked."""
        allowed = is_text & ~self.is_special[tokens]
        starts = None if self.words is None else self.words.starts(tokens)
        chosen = choose(allowed, self.masking.rate, seed, rows, starts)
        return mask_tokens(tokens, chosen, self.masking, seed, rows)


@dataclasses.dataclass(frozen=True)
class PairRows(RowMaker):
    """Makes rows of masked language modelling and next sentence prediction."""

    frame: Frame
    masked: MaskedRows

    def __call__(self, chunks: PairChunks, which: np.ndarray, seed: int, rows: np.ndarray):
        pairs = pair_rows(chunks.read(which), chunks, self.frame, seed, rows)
        tokens, is_text = pairs.pop("tokens"), pairs.pop("is_text")
        return self.masked.masked(tokens, is_text, seed, rows) | pairs


@dataclasses.dataclass(frozen=True)
class SpanRows(RowMaker):
    """Makes rows of span corruption: `sources` as long as the encoder takes, and what the decoder
    reads and predicts, `length` tokens."""

    lengths: Lengths
    source_len: int
    length: int
    sentinels: np.ndarray
    start: int
    end: int

    def __call__(self, chunks: Chunks, which: np.ndarray, seed: int, rows: np.ndarray) -> Arrays:
        noise = noise_mask(self.lengths, seed, rows)
        tokens = chunks.read(which)["inputs"]
        sources, targets = corrupt_spans(tokens, noise, self.sentinels, self.end)
        inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=self.start)
        return {
            "inputs": _padded(inputs, self.length, 0),
            "targets": _padded(targets, self.length, IGNORE),
            "segments": _padded(np.ones_like(targets), self.length, 0),
            "sources": _padded(sources, self.source_len, 0),
            "source_segments": _padded(np.ones_like(sources), self.source_len, 0),
        }

    def num_targets(self, chunks: Chunks, which: np.ndarray, seed: int, rows: np.ndarray) -> int:
        """Returns how many targets the rows have: all as many."""
        return len(which) * self.lengths.targets


def _padded(array: np.ndarray, length: int, value: int) -> np.ndarray:
    room = length - array.shape[1]
    return np.pad(array, ((0, 0), (0, room)), constant_values=value).astype(np.int32)


class PrefixRows(RowMaker):
    """Makes rows of prefix language modelling."""

    def __call__(self, chunks: Chunks, which: np.ndarray, seed: int, rows: np.ndarray) -> Arrays:
        return split_rows(chunks.read(which), seed, rows)


@dataclasses.dataclass(frozen=True)
class MiddleRows(RowMaker):
    """Makes rows whose documents' middles are moved."""

    how: Middle

    def __call__(self, chunks: Chunks, which: np.ndarray, seed: int, rows: np.ndarray) -> Arrays:
        return move_middles(chunks.read(which), self.how, seed, rows)

    def num_targets(self, chunks: Chunks, which: np.ndarray, seed: int, rows: np.ndarray) -> int:
        """Returns how many targets the chunks have: a moved middle changes none into no target."""
        return chunks.num_targets(which)
