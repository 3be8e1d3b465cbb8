"""Text of ids that come one by one: whole characters, each once."""

from collections.abc import Iterable
from functools import partial

from jaxgpt.tokenizer.base import HALF, Tokenizer


class GrowingText:
    """The text that ids add behind a prompt: `add(id) + ... + rest()` is what `decode` makes of the
    prompt and all of them, less the prompt's own text.

    A token's text may depend on what is before it (the space in front of a word, where a model
    drops that of a text's first word; the bytes of a character), but only on the last few: so a
    window of the last ids is decoded at a time, and a text of n tokens takes O(n) time.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable = (), prompt_text: str = ""):
        """`prompt_text` is the text of the ids `prompt`; where it ends inside a character, without
        what stands for that (see `text_before`)."""
        self.tokenizer = tokenizer
        self.window = prompt = [int(i) for i in prompt]
        for count in (2**k for k in range(len(prompt).bit_length())):
            if text := tokenizer.decode(self.window[-count:]):
                if text == tokenizer.settled(self.window[-count:]):
                    self.window = self.window[-count:]
                    break
        is_whole = prompt_text == tokenizer.decode(prompt)  # else it may end inside a character
        text = tokenizer.decode if is_whole else partial(text_before, tokenizer)
        self.given = len(text(self.window))  # characters of the window's text

    def add(self, token: int) -> str:
        """Returns the text that is certain now and was not before."""
        self.window.append(int(token))
        text = self.tokenizer.settled(self.window)
        new, self.given = text[self.given :], max(self.given, len(text))
        last = self.tokenizer.decode(self.window[-1:])
        if last and last == self.tokenizer.settled(self.window[-1:]):
            if text == self.tokenizer.decode(self.window):
                self.window, self.given = self.window[-1:], len(last)
        return new

    def rest(self) -> str:
        """Returns what was held back, where nothing more comes."""
        text = self.tokenizer.decode(self.window)
        new, self.given = text[self.given :], max(self.given, len(text))
        return new


def text_before(tokenizer: Tokenizer, ids: Iterable) -> str:
    """Returns the text of a prompt of `ids`: where they end inside a character, up to that."""
    text = tokenizer.decode(ids)
    return tokenizer.settled(ids) if text.endswith(HALF) else text
