"""The windows of one source: what stands in each, and how many targets it has."""

import dataclasses

import numpy as np

from jaxgpt.config.schema import IGNORE
from jaxgpt.data.packing import Plan, count_up


@dataclasses.dataclass(frozen=True)
class Contiguous:
    """Window w holds tokens w*T .. (w+1)*T of one stream: the last of them is a target only."""

    tokens: np.ndarray
    seq_len: int
    mask: np.ndarray | None = None  # which tokens are targets; None = all

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def read(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `inputs` and `targets` of the windows, int32 [n, T]."""
        places = windows[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        ids = self.tokens[places].astype(np.int32)
        targets = ids[:, 1:]
        if self.mask is not None:
            targets = np.where(self.mask[places[:, 1:]], targets, IGNORE)
        return {"inputs": ids[:, :-1], "targets": targets}

    def num_targets(self, windows: np.ndarray) -> int:
        """Returns how many targets the windows have together."""
        if self.mask is not None:
            return int(np.count_nonzero(self.read(windows)["targets"] != IGNORE))
        return len(windows) * self.seq_len

    def spans(self, window: int) -> list[tuple[int, int]]:
        """Returns the (start, length) in the stream of what the window's inputs are."""
        return [(window * self.seq_len, self.seq_len)]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Windows of whole documents by a plan, none of which sees another.

    `segments` number a window's documents from 1, 0 is padding; `positions` start at 0 in each;
    padding has no targets.
    """

    tokens: np.ndarray
    seq_len: int
    plan: Plan
    end_of_text: int
    mask: np.ndarray | None = None  # which tokens are targets; None = all

    def __len__(self) -> int:
        return len(self.plan.first) - 1

    def read(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `inputs`, `targets`, `segments`, `positions` of the windows, int32 [n, T]."""
        rows, length = len(windows), self.seq_len
        first = self.plan.first[windows]
        counts = self.plan.first[windows + 1] - first
        pieces = np.repeat(first, counts) + (number := count_up(counts))
        starts, lengths = self.plan.starts[pieces], self.plan.lengths[pieces].astype(np.int64)
        position = count_up(lengths)
        row_of_piece = np.repeat(np.arange(rows), counts)
        filled = np.bincount(row_of_piece, lengths, minlength=rows).astype(np.int64)
        place = np.repeat(np.arange(rows) * length, filled) + count_up(filled)
        source = np.repeat(starts, lengths) + position
        ends = len(self.tokens)  # behind the last document stands an end-of-text in thought
        behind = np.minimum(source + 1, ends - 1)
        following = self.tokens[behind].astype(np.int32)  # IGNORE is negative
        following[source + 1 == ends] = self.end_of_text
        if self.mask is not None:  # the last end-of-text is learnt if what it ends is
            following = np.where(self.mask[behind], following, IGNORE)
        found = {
            "inputs": (self.tokens[source], 0),
            "targets": (following, IGNORE),
            "segments": (np.repeat(number + 1, lengths), 0),
            "positions": (position, 0),
        }
        batch = {}
        for name, (values, padding) in found.items():
            flat = np.full(rows * length, padding, np.int32)
            flat[place] = values
            batch[name] = flat.reshape(rows, length)
        return batch

    def num_targets(self, windows: np.ndarray) -> int:
        """Returns how many targets the windows have together."""
        if self.mask is not None:
            return int(np.count_nonzero(self.read(windows)["targets"] != IGNORE))
        first = self.plan.first
        return int(
            sum(self.plan.lengths[first[w] : first[w + 1]].sum(dtype=np.int64) for w in windows)
        )

    def spans(self, window: int) -> list[tuple[int, int]]:
        """Returns the (start, length) in the stream of each document in the window."""
        pieces = slice(self.plan.first[window], self.plan.first[window + 1])
        return list(
            zip(self.plan.starts[pieces].tolist(), self.plan.lengths[pieces].tolist(), strict=True)
        )
