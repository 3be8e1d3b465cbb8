"""Decoding ids that come one by one, as a stream of whole characters."""

from collections.abc import Iterable
from functools import partial

from jaxgpt.tokenizer.base import REPLACEMENT, Tokenizer


class IncrementalDetokenizer:
    """The text that ids add to a prompt: `add(id) + ... + flush()` is `decode` of the prompt and
    all ids, less the prompt's own text.

    A token's text may depend on the tokens before it (the space in front of a word, which some
    models drop from a text's first word; the bytes of a character), but only on the last few. So
    only a tail of the ids is decoded each time, and a text of n tokens takes O(n) time.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable = (), prompt_text: str = ""):
        """`prompt_text` is the text of the ids `prompt`, or `decode_prompt` of them."""
        self.tokenizer = tokenizer
        self.tail = prompt = [int(i) for i in prompt]
        for count in (2**k for k in range(len(prompt).bit_length())):
            if text := tokenizer.decode(prompt[-count:]):
                if text == tokenizer.decode_stable(prompt[-count:]):
                    self.tail = prompt[-count:]
                    break
        is_whole = prompt_text == tokenizer.decode(prompt)  # else it may end inside a character
        decode = tokenizer.decode if is_whole else partial(decode_prompt, tokenizer)
        self.returned = len(decode(self.tail))  # characters of the tail's text

    def add(self, token: int) -> str:
        """Returns the text that became certain with this token."""
        self.tail.append(int(token))
        text = self.tokenizer.decode_stable(self.tail)
        new = self._new(text)
        last = self.tokenizer.decode(self.tail[-1:])
        if last and last == self.tokenizer.decode_stable(self.tail[-1:]):
            if text == self.tokenizer.decode(self.tail):
                self.tail, self.returned = self.tail[-1:], len(last)
        return new

    def flush(self) -> str:
        """Returns the text held back so far, when no more ids come."""
        return self._new(self.tokenizer.decode(self.tail))

    def _new(self, text: str) -> str:
        new, self.returned = text[self.returned :], max(self.returned, len(text))
        return new


def decode_prompt(tokenizer: Tokenizer, ids: Iterable) -> str:
    """Returns the text of a prompt of `ids`; where they end inside a character, up to that."""
    text = tokenizer.decode(ids)
    return tokenizer.decode_stable(ids) if text.endswith(REPLACEMENT) else text
