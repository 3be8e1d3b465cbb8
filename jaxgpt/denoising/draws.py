"""Random numbers as a function of (seed, row): the same whichever rows are drawn together."""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio


def uniforms(seed: int, rows: np.ndarray, count: int, purpose: int = 0) -> np.ndarray:
    """Returns `count` numbers from [0, 1) for each of `rows`, the rows' numbers in an endless
    sequence; float64 [n, count]. Draws for different purposes are independent.

    SplitMix64 (Steele, Lea and Flood 2014, figure 17), whose state starts from a hash of seed,
    purpose and row: no generator is made, and no row waits for another.
    """
    state = np.array([seed], np.uint64)
    for part in (np.array([purpose], np.uint64), rows.astype(np.uint64)):
        state = _mix(state + np.uint64(GOLDEN)) + part
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    bits = _mix(_mix(state)[:, None] + steps)
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def integers(seed: int, rows: np.ndarray, low, high, purpose: int = 0) -> np.ndarray:
    """Returns one integer from `low` to `high`, both included, for each of `rows`; the bounds are
    numbers or one for each row. int64 [n]."""
    share = uniforms(seed, rows, 1, purpose)[:, 0]
    return low + (share * (high - low + 1)).astype(np.int64)


def ranks(seed: int, rows: np.ndarray, allowed: np.ndarray, purpose: int = 0) -> np.ndarray:
    """Returns the places 0, 1, ... of each row's columns in a random order, those that are
    `allowed` [n, T] first; int64 [n, T]."""
    draws = uniforms(seed, rows, allowed.shape[1], purpose)
    order = np.argsort(np.where(allowed, draws, 1 + draws), axis=1)
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(allowed.shape[1])[None], axis=1)
    return places
