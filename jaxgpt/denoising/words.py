"""Where words begin in tokens, whatever the tokenizer: whole-word masking hides words, and a text
is cut inside a token at its word."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jaxgpt.tokenizer.base import Tokenizer


class Words(NamedTuple):
    """Of each id, whether its text begins and ends with a letter, a digit or `_` (or part of such a
    character), its bytes, and how many. Special tokens have no text."""

    begins: np.ndarray
    ends: np.ndarray
    texts: tuple[bytes, ...]
    sizes: np.ndarray

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Returns which of `tokens` [..., T] begin a word: all but those that go on with the
        letters of the token before. Punctuation and spaces are words of their own, as are digits
        and letters together; a space in front belongs to its word."""
        goes_on = self.begins[tokens[..., 1:]] & self.ends[tokens[..., :-1]]
        return np.concatenate([np.ones((*tokens.shape[:-1], 1), bool), ~goes_on], axis=-1)


@lru_cache(maxsize=4)
def words_of(tokenizer: Tokenizer) -> Words:
    """Returns the tokenizer's table of words."""
    special = {tokenizer.end_of_text, *getattr(tokenizer, "special", {}).values()}
    texts = tuple(
        b"" if token in special else tokenizer.token_bytes(token)
        for token in range(tokenizer.vocab_size)
    )
    begins = np.array([_is_letter(text[:4], 0) for text in texts])
    ends = np.array([_is_letter(text[-4:], -1) for text in texts])
    return Words(begins, ends, texts, np.array(list(map(len, texts))))


def _is_letter(text: bytes, place: int) -> bool:
    """Says whether the character at one end of `text` is a letter, a digit or `_`; a part of a
    character counts as one."""
    decoded = text.decode("utf-8", "replace")
    return bool(text) and (decoded[place] in "_\ufffd" or decoded[place].isalnum())
