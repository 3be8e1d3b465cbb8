"""Sparse attention patterns: which keys a query may see, and in which blocks those lie.

A pattern is the union of a few parts. Each says which pairs of positions it covers, in arithmetic
that NumPy, XLA and Pallas run alike, and how to cut the positions into blocks so that every query
finds its keys in a few of them. Whether a mask is causal is said elsewhere (`ops.mask.Reach`); the
examples are not.

- `longformer` (arXiv:2004.05150): a window, which a dilation spreads, and global tokens, which see
  every token and are seen by all. Window 2, dilation 3: position 9 sees 6, 9 and 12.
- `strided` (arXiv:1904.10509, section 4.2): the last positions, and every stride-th. Stride 4:
  position 9 sees 6 to 12, 1, 5, 13, ...
- `axial` (arXiv:1912.12180): positions are laid out in rows; each sees its row and its column. The
  paper's layers see one of both, in turns. Columns 4: position 9 sees 8 to 11, 1, 5, 13, ...
- `bigbird` (arXiv:2007.14062, section 2): each block sees itself, its neighbours, the global tokens
  and a few random blocks, which are the same in all heads and layers.
- `lsh` (arXiv:2001.04451): the keys most like the query, found by hashing: see `lsh`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxgpt.config import ModelConfig

MOST, LEAST = 128, 16  # positions of a block of a window
ROWS = 512  # queries that `keys_seen` looks at


class Layout(NamedTuple):
    """How a part cuts L positions into blocks.

    Positions p, p + phases, p + 2 * phases, ... follow one another; blocks hold `block` of them.
    `keys` name the blocks of keys that each block of queries reads: a number is the distance from
    the block of the queries, an array names one for each of them (-1: none).
    """

    phases: int
    block: int
    keys: tuple[int | np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Window:
    """Every `dilation`-th position, `size` of them on each side, the query's own included."""

    size: int
    dilation: int = 1

    def covers(self, q, k):
        """Says which pairs of positions this part covers."""
        near = (q - k < self.size * self.dilation) & (k - q < self.size * self.dilation)
        return near & ((q - k) % self.dilation == 0) if self.dilation > 1 else near

    def layout(self, length: int, causal: bool) -> Layout:
        """Returns blocks of half a window: the fewer keys too many, the more often each is read."""
        own = -(-length // self.dilation)
        block = min(max(self.size // 2, LEAST), MOST, max(own, 1))
        back = min(-(-(self.size - 1) // block), -(-own // block) - 1)
        return Layout(self.dilation, block, tuple(range(-back, 1 if causal else back + 1)))


@dataclasses.dataclass(frozen=True)
class Row:
    """The positions of the query's own row of `columns`."""

    columns: int

    def covers(self, q, k):
        """Says which pairs of positions this part covers."""
        return q // self.columns == k // self.columns

    def layout(self, length: int, causal: bool) -> Layout:
        """Returns a block a row."""
        return Layout(1, self.columns, (0,))


@dataclasses.dataclass(frozen=True)
class Column:
    """Every `stride`-th position before and after the query's: its column, in rows of `stride`."""

    stride: int

    def covers(self, q, k):
        """Says which pairs of positions this part covers."""
        return (q - k) % self.stride == 0

    def layout(self, length: int, causal: bool) -> Layout:
        """Returns a block a column."""
        return Layout(self.stride, -(-length // self.stride), (0,))


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The query's block of `block` positions, and those beside it."""

    block: int

    def covers(self, q, k):
        """Says which pairs of positions this part covers."""
        apart = q // self.block - k // self.block
        return (apart < 2) & (apart > -2)

    def layout(self, length: int, causal: bool) -> Layout:
        """Returns the blocks themselves."""
        return Layout(1, self.block, (-1, 0) if causal else (-1, 0, 1))


@dataclasses.dataclass(frozen=True)
class Random:
    """`count` blocks, one at random from each of as many equal shares of those there are.

    Causal: of those before the block in front of the query's; else of the `blocks` of the context.
    The draw is arithmetic on the block's number, so that no mask holds a table.
    """

    block: int
    count: int
    blocks: int
    causal: bool

    def drawn(self, row, share: int):
        """Returns the block that the blocks `row` draw from a share; -1: the share is empty."""
        there = row - 1 if self.causal else row * 0 + self.blocks
        low, high = share * there // self.count, (share + 1) * there // self.count
        size = high - low
        mixed = (row * 7919 + share * 10007 + 1) % 46337  # a prime whose square is an int32
        mixed = (mixed * mixed + row * 31 + share * 17) % 46337
        mixed = (mixed * mixed + row) % 46337
        some = size > 0
        return some * (low + mixed % (size * some + 1 - some) + 1) - 1

    def covers(self, q, k):
        """Says which pairs of positions this part covers."""
        row, column = q // self.block, k // self.block
        found = self.drawn(row, 0) == column
        for share in range(1, self.count):
            found = found | (self.drawn(row, share) == column)
        return found

    def layout(self, length: int, causal: bool) -> Layout:
        """Returns the blocks drawn; those beyond `length` are left out."""
        rows = np.arange(-(-length // self.block), dtype=np.int32)
        drawn = (self.drawn(rows, share) for share in range(self.count))
        return Layout(1, self.block, tuple(np.where(d < len(rows), d, -1) for d in drawn))


@dataclasses.dataclass(frozen=True)
class First:
    """The first `count` positions, which every query sees."""

    count: int

    def covers(self, q, k):
        """Says which pairs of positions this part covers."""
        return (k < self.count) & (q == q)

    def layout(self, length: int, causal: bool) -> None:
        """Returns None: the keys are the same for all queries."""
        return None


Part = Window | Row | Column | Neighbours | Random | First


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The union of `parts`; the first `first` queries see every key. Positions start at 0."""

    parts: tuple[Part, ...]
    first: int = 0

    def visible(self, q, k):
        """Says which pairs of positions the pattern lets see, causal or not."""
        seen = q < self.first
        for part in self.parts:
            seen = seen | part.covers(q, k)
        return seen

    @property
    def grain(self) -> int:
        """How many neighbours are seen together, or not, rounded down to TPU's 128 lanes."""
        sizes = (getattr(p, "block", 0) or getattr(p, "size", 0) for p in self.parts)
        return max(min(size for size in sizes if size) // 128 * 128, 128)

    @property
    def in_blocks(self) -> bool:
        """Whether what is not seen are whole blocks of neighbours, which splash can skip."""
        return not any(isinstance(p, Column) or getattr(p, "dilation", 1) > 1 for p in self.parts)


@dataclasses.dataclass(frozen=True)
class Lsh:
    """Of all other keys those in a query's chunk of `chunk` tokens or the one before, sorted by
    hash, in any of `rounds` rounds; the query's own key only if there is no other."""

    chunk: int
    rounds: int

    def visible(self, q, k):
        """Says which keys hashing chooses from: those that decoding, which does not hash, reads."""
        return (q != k) | (q == 0)


@functools.lru_cache
def keys_seen(pattern: Pattern | Lsh, length: int, causal: bool) -> float:
    """Returns how many keys a query sees on average over `length` positions, of `ROWS` of them
    where there are more; hashing, as many as it reads."""
    if isinstance(pattern, Lsh):
        return float(min(2 * pattern.chunk * pattern.rounds, length))
    q = np.unique(np.linspace(0, length - 1, ROWS).astype(np.int32))[:, None]
    k = np.arange(length, dtype=np.int32)[None]
    seen = pattern.visible(q, k)
    return float((seen & (k <= q) if causal else seen).mean() * length)


def _global(count: int, causal: bool) -> tuple[tuple[Part, ...], int]:
    return ((First(count),) if count else ()), (0 if causal else count)


def _longformer(cfg: ModelConfig, causal: bool) -> Pattern:
    seen, first = _global(cfg.global_tokens, causal)
    return Pattern((Window(cfg.sparse_block, cfg.dilation), *seen), first)


def _strided(cfg: ModelConfig, causal: bool) -> Pattern:
    return Pattern((Window(cfg.sparse_block), Column(cfg.sparse_block)))


def _axial(cfg: ModelConfig, causal: bool) -> Pattern:
    return Pattern((Row(cfg.sparse_block), Column(cfg.sparse_block)))


def _bigbird(cfg: ModelConfig, causal: bool) -> Pattern:
    seen, first = _global(cfg.global_tokens, causal)
    block, count = cfg.sparse_block, cfg.random_blocks
    blocks = math.ceil(cfg.max_seq_len / block)
    drawn = (Random(block, count, blocks, causal),) if count else ()
    return Pattern((Neighbours(block), *seen, *drawn), first)


def _lsh(cfg: ModelConfig, causal: bool) -> Lsh:
    return Lsh(cfg.sparse_block, cfg.hash_rounds)


PATTERNS: dict[str, Callable[[ModelConfig, bool], Pattern | Lsh]] = {
    "longformer": _longformer,
    "strided": _strided,
    "axial": _axial,
    "bigbird": _bigbird,
    "lsh": _lsh,
}


def patterns_of(cfg: ModelConfig) -> tuple[Pattern | Lsh | None, Pattern | Lsh | None]:
    """Returns the patterns of all-to-all and of causal attention; None: every key."""
    if cfg.attention_pattern == "full":
        return None, None
    return PATTERNS[cfg.attention_pattern](cfg, False), PATTERNS[cfg.attention_pattern](cfg, True)
