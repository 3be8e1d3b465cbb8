"""The chunks of one source, which are the rows of batches, and how many targets each has."""

import dataclasses

import numpy as np

from jaxgpt.config.schema import IGNORE
from jaxgpt.data.packing import Plan, count_up


def next_token(tokens: np.ndarray, is_target: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Returns `inputs` and `targets` [..., T] of tokens [..., T+1]: the target of each input is the
    token after it, or IGNORE where `is_target` [..., T] is 0."""
    targets = tokens[..., 1:]
    if is_target is not None:
        targets = np.where(is_target, targets, IGNORE)
    return {"inputs": tokens[..., :-1], "targets": targets}


class Chunks:
    """The chunks of one source: `read` gives their arrays, `segments` where one comes from."""

    def num_targets(self, chunks: np.ndarray) -> int:
        """Returns how many targets the chunks have together."""
        if self.mask is not None:
            return int(np.count_nonzero(self.read(chunks)["targets"] != IGNORE))
        return sum(length for chunk in chunks.tolist() for _, length in self.segments(chunk))


@dataclasses.dataclass(frozen=True)
class ContiguousChunks(Chunks):
    """Chunk c holds tokens c*T .. (c+1)*T of one stream; the last of them is only a target."""

    tokens: np.ndarray
    seq_len: int
    mask: np.ndarray | None = None  # which tokens are targets; None = all

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def read(self, chunks: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `inputs` and `targets` of the chunks, int32 [n, T]."""
        offsets = chunks[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        is_target = None if self.mask is None else self.mask[offsets[:, 1:]]
        return next_token(self.tokens[offsets].astype(np.int32), is_target)

    def segments(self, chunk: int) -> list[tuple[int, int]]:
        """Returns the (start, length) in the stream of the chunk's inputs."""
        return [(chunk * self.seq_len, self.seq_len)]


@dataclasses.dataclass(frozen=True)
class PackedChunks(Chunks):
    """Chunks of whole documents by a plan; no document attends to another.

    `segments` number a chunk's documents from 1, 0 is padding; `positions` start at 0 in each;
    padding has no targets.
    """

    tokens: np.ndarray
    seq_len: int
    plan: Plan
    end_of_text: int
    mask: np.ndarray | None = None  # which tokens are targets; None = all

    def __len__(self) -> int:
        return len(self.plan.first) - 1

    def read(self, chunks: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `inputs`, `targets`, `segments`, `positions` of the chunks, int32 [n, T]."""
        rows, length = len(chunks), self.seq_len
        first = self.plan.first[chunks]
        counts = self.plan.first[chunks + 1] - first
        number = count_up(counts)  # of each segment in its chunk
        segments = np.repeat(first, counts) + number
        starts, lengths = self.plan.starts[segments], self.plan.lengths[segments].astype(np.int64)
        position = count_up(lengths)
        row_of_segment = np.repeat(np.arange(rows), counts)
        filled = np.bincount(row_of_segment, lengths, minlength=rows).astype(np.int64)
        slot = np.repeat(np.arange(rows) * length, filled) + count_up(filled)
        source = np.repeat(starts, lengths) + position
        is_last = source + 1 == len(self.tokens)
        following = np.where(is_last, source, source + 1)
        # the last document is treated as if followed by an end-of-text token
        targets = np.where(is_last, self.end_of_text, self.tokens[following].astype(np.int32))
        if self.mask is not None:  # that end-of-text is a target if the token before it is
            targets = np.where(self.mask[following], targets, IGNORE)

        def layout(values: np.ndarray, padding: int) -> np.ndarray:
            flat = np.full(rows * length, padding, np.int32)
            flat[slot] = values
            return flat.reshape(rows, length)

        return {
            "inputs": layout(self.tokens[source], 0),
            "targets": layout(targets, IGNORE),
            "segments": layout(np.repeat(number + 1, lengths), 0),
            "positions": layout(position, 0),
        }

    def segments(self, chunk: int) -> list[tuple[int, int]]:
        """Returns the (start, length) in the stream of each document in the chunk."""
        segments = slice(self.plan.first[chunk], self.plan.first[chunk + 1])
        starts, lengths = self.plan.starts[segments], self.plan.lengths[segments]
        return list(zip(starts.tolist(), lengths.tolist(), strict=True))
