"""Which source's turn it is: exact over any prefix."""

import math
from fractions import Fraction

import numpy as np

from jaxgpt.system.errors import BadInput

LONGEST_PERIOD = 1 << 17  # about a second to lay out


class Turns:
    """A fixed sequence of sources: among the first n turns each has n * weight of them, off by
    less than one.

    Tijdeman's rule (The chairman assignment problem, Discrete Mathematics 32, 1980): of the
    sources that are far enough behind, the one that would be late first. Weights are exact
    fractions, so the sequence repeats and any place of it can be looked up.
    """

    def __init__(self, weights: tuple[Fraction, ...]):
        self.period = math.lcm(*(w.denominator for w in weights))
        if self.period > LONGEST_PERIOD:
            raise BadInput(
                f"the weights {', '.join(map(str, weights))} repeat only after {self.period:,}"
                " windows; write them with fewer digits"
            )
        self.shares = np.array([int(w * self.period) for w in weights])
        self.source = _assign(self.shares, self.period)
        self.rank = np.empty(self.period, np.int64)  # how many turns the source had before
        for i, share in enumerate(self.shares):
            self.rank[self.source == i] = np.arange(share)

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (source, which of that source's turns) of each place, all from 0."""
        round_, within = np.divmod(places, self.period)
        source = self.source[within]
        return source, round_ * self.shares[source] + self.rank[within]


def _assign(shares: np.ndarray, period: int) -> np.ndarray:
    if len(shares) == 1:
        return np.zeros(period, np.int64)
    # scaled by (2m - 2) * period, everything is an integer
    scale = 2 * len(shares) - 2
    given, chosen = np.zeros(len(shares), np.int64), np.empty(period, np.int64)
    for n in range(1, period + 1):
        behind = scale * (n * shares - given * period)
        slack = (scale - 1) * period - behind
        late = np.where(behind >= period, slack / shares, np.inf)
        chosen[n - 1] = i = int(np.argmin(late))
        given[i] += 1
    return chosen
