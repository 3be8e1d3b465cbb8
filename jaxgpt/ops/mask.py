"""Which keys a query may see, as one value that every attention kernel understands or refuses."""

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Int

from jaxgpt.ops.sparse.patterns import Lsh, Pattern


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Reach:
    """The part of a mask that is known when a program is compiled.

    `causal`: keys up to the query's own position; else later ones too. `window` > 0: only keys less
    than so many positions away. `pattern`: only keys that it lets a query see.
    """

    causal: bool = True
    window: int = 0
    pattern: Pattern | Lsh | None = None

    def visible(self, q, k):
        """Says which pairs of positions it lets see."""
        seen = k <= q if self.causal else (k == k) & (q == q)
        if self.window:
            seen &= (k > q - self.window) & (k < q + self.window)
        return seen & self.pattern.visible(q, k) if self.pattern else seen


class AttentionMask(NamedTuple):
    """The positions of queries and keys, and which keys a query may see.

    A query sees keys of its own segment within `reach`; in front of `prefix`, a length for each
    row, every query sees every key (a prefix language model, arXiv:1910.10683, section 3.2.1).
    Segments number the documents packed into a row, or set padding apart; None: all are one. A
    cache's unwritten slot has a position beyond every query's, so a causal mask leaves it out.

    With window 2, position 5 sees 4 and 5; not causal, also 6. With prefix 3, positions 0 to 2 see
    each other, and position 3 sees all four.
    """

    q_positions: Int[Array, "B T"]
    kv_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"] | None = None
    kv_segments: Int[Array, "B S"] | None = None
    prefix: Int[Array, "B"] | None = None
    reach: Reach = Reach()

    def within(self, window: int, pattern: Pattern | Lsh | None = None) -> "AttentionMask":
        """Returns the same mask with another window (0: none) and pattern."""
        reach = dataclasses.replace(self.reach, window=window, pattern=pattern)
        return self._replace(reach=reach)

    def part(self, queries: slice, keys: slice) -> "AttentionMask":
        """Returns the mask of some of the queries and some of the keys."""
        parts = (self.q_positions[:, queries], self.kv_positions[:, keys])
        if self.q_segments is not None:
            parts += (self.q_segments[:, queries], self.kv_segments[:, keys])
        return AttentionMask(*parts, prefix=self.prefix, reach=self.reach)

    def visible(self) -> Bool[Array, "B T S"]:
        """Returns which keys each query sees."""
        q, kv = self.q_positions[:, :, None], self.kv_positions[:, None, :]
        seen = self.reach.visible(q, kv)
        if self.prefix is not None:
            seen |= kv < self.prefix[:, None, None]
        if self.q_segments is not None:
            seen &= self.q_segments[:, :, None] == self.kv_segments[:, None, :]
        return seen
