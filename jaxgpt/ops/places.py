"""Where queries and keys stand, and which see which."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int


class Places(NamedTuple):
    """Where queries and keys stand. A query sees keys of its segment up to its own position.

    Segments number the documents packed into a row, or set padding apart; None: all are one. A
    cache's unwritten slot has a position beyond every query's, and is masked by that.
    """

    q: Int[Array, "B T"]
    kv: Int[Array, "B S"]
    q_segments: Int[Array, "B T"] | None = None
    kv_segments: Int[Array, "B S"] | None = None


def visible(places: Places, window: int) -> Bool[Array, "B T S"]:
    """Returns which keys each query sees; `window` > 0 keeps the last so many, itself included.

    With window 2: position 5 sees 4 and 5.
    """
    q, kv = places.q[:, :, None], places.kv[:, None, :]
    seen = kv <= q
    if window:
        seen &= kv > q - window
    if places.q_segments is not None:
        seen &= places.q_segments[:, :, None] == places.kv_segments[:, None, :]
    return seen
