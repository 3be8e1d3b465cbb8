"""In which order a mixture's sources are used: their shares are exact over any prefix."""

import math
from fractions import Fraction

import numpy as np

from jaxgpt.system.errors import BadInput

LONGEST_PERIOD = 1 << 17  # takes about a second to compute


class MixtureSchedule:
    """A fixed sequence of sources: each has n * weight of the first n examples, off by less than
    one.

    Tijdeman's rule (The chairman assignment problem, Discrete Mathematics 32, 1980): of the
    sources that are far enough behind their share, take the one that would be late first. Weights
    are exact fractions, so the sequence is periodic and can be read from any index on.
    """

    def __init__(self, weights: tuple[Fraction, ...]):
        self.period = math.lcm(*(w.denominator for w in weights))
        if self.period > LONGEST_PERIOD:
            raise BadInput(
                f"the weights {', '.join(map(str, weights))} repeat only after {self.period:,}"
                " chunks; write them with fewer digits"
            )
        self.shares = np.array([int(w * self.period) for w in weights])
        self.source = _assign(self.shares, self.period)
        self.rank = np.empty(self.period, np.int64)  # how many examples the source had before
        for i, share in enumerate(self.shares):
            self.rank[self.source == i] = np.arange(share)

    def at(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (source, how many examples the source had before) of each index, from 0."""
        periods, within = np.divmod(indices, self.period)
        source = self.source[within]
        return source, periods * self.shares[source] + self.rank[within]


def _assign(shares: np.ndarray, period: int) -> np.ndarray:
    if len(shares) == 1:
        return np.zeros(period, np.int64)
    # scaled by (2m - 2) * period, everything is an integer
    scale = 2 * len(shares) - 2
    counts, sources = np.zeros(len(shares), np.int64), np.empty(period, np.int64)
    for n in range(1, period + 1):
        behind = scale * (n * shares - counts * period)
        slack = (scale - 1) * period - behind
        late = np.where(behind >= period, slack / shares, np.inf)
        sources[n - 1] = source = int(np.argmin(late))
        counts[source] += 1
    return sources
