"""Words and n-grams as numbers, the same on every machine."""

import functools
import hashlib
import re

import numpy as np

WORD = re.compile(r"\w+")


def word_hashes(text: str) -> np.ndarray:
    """Returns a 64-bit hash of each word of `text`, lower-cased and without punctuation."""
    return np.array([_hash(word) for word in WORD.findall(text.lower())], np.uint64)


def ngram_hashes(text: str, n: int) -> np.ndarray:
    """Returns a 64-bit hash of each run of `n` words; none where there are fewer."""
    words = word_hashes(text)
    count = len(words) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for i in range(n):  # a polynomial over words modulo 2**64, then mixed (splitmix64's finaliser)
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[i : i + count]
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(27))


@functools.lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
