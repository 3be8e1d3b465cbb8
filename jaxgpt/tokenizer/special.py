"""Special tokens: single ids with a name, which plain text never turns into."""

import json
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer.base import Tokenizer, encode_around

SPECIAL_FILE = "special_tokens.json"
MOST_IN_A_RANGE = 10_000


def special_names(text: str) -> list[str]:
    """Returns the names in `data.special_tokens`, comma-separated; `<extra_id_0..99>` stands for
    the hundred from `<extra_id_0>` to `<extra_id_99>`. Raises `BadInput` for a longer range."""
    names: list[str] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(.*\D)(\d{1,9})\.\.(\d{1,9})(\D.*)", part.strip())
        first, last = map(int, match.group(2, 3)) if match else (0, 0)
        if last - first >= MOST_IN_A_RANGE:
            raise BadInput(f"data.special_tokens: {part} stands for more than {MOST_IN_A_RANGE:,}")
        some = range(first, last + 1)
        names += [f"{match[1]}{i}{match[4]}" for i in some] if match else [part.strip()]
    return names


class SpecialTokens(Tokenizer):
    """A tokenizer with more ids after its own: `names[i]` is `base.vocab_size + i`.

    `encode` never returns one of them, whatever the text says; `decode` writes the names.
    """

    def __init__(self, base: Tokenizer, names: Sequence[str]):
        names = [name.strip() for name in names]
        if not all(names) or len(set(names)) < len(names):
            raise BadInput(
                f"data.special_tokens={','.join(names)}: give different names, none empty"
            )
        self.base, self.names, self.kind = base, names, base.kind
        self.own = {name: base.vocab_size + i for i, name in enumerate(names)}
        self.special, self.roles = dict(base.special) | self.own, base.roles
        self.vocab_size = base.vocab_size + len(names)
        self.end_of_text, self.cuttable = base.end_of_text, base.cuttable

    def encode(self, text: str) -> np.ndarray:
        return self.base.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.base.encode_batch(texts)

    def encode_with_special(self, text: str) -> np.ndarray:
        return encode_around(text, self.own, self.base.encode_with_special)

    def frame(self, is_pair: bool) -> list[tuple[int, int]]:
        named = {"[CLS]", "[SEP]"} & set(self.names)
        return super().frame(is_pair) if named else self.base.frame(is_pair)

    def decode(self, ids: Iterable) -> str:
        text, plain = [], []
        for i in map(int, ids):
            if i < self.base.vocab_size:
                plain.append(i)
            elif i < self.vocab_size:
                text += [self.base.decode(plain), self.names[i - self.base.vocab_size]]
                plain = []
        return "".join([*text, self.base.decode(plain)])

    def decode_stable(self, ids: Iterable) -> str:
        ids = [int(i) for i in ids if 0 <= i < self.vocab_size]
        last = max((at for at, i in enumerate(ids) if i >= self.base.vocab_size), default=-1) + 1
        return self.decode(ids[:last]) + self.base.decode_stable(ids[last:])

    def token_bytes(self, token: int) -> bytes:
        if token < self.base.vocab_size:
            return self.base.token_bytes(token)
        return self.names[token - self.base.vocab_size].encode()

    def offsets(self, text: str, ids: np.ndarray) -> np.ndarray:
        return self.base.offsets(text, ids)

    def save(self, folder: os.PathLike) -> None:
        self.base.save(folder)
        (folder / SPECIAL_FILE).write_text(json.dumps(self.names))


def special_id(tokenizer: Tokenizer, purpose: str, *names: str) -> int:
    """Returns the id of the first of `names` (spellings of one special token, say `[MASK]` and
    `<mask>`) that the tokenizer has. Raises `BadInput` if it has none: `purpose` needs it."""
    if found := [tokenizer.special[name] for name in names if name in tokenizer.special]:
        return found[0]
    raise BadInput(
        f"{purpose} needs the special token {names[0]}, which the tokenizer lacks: train with"
        f" --config.data.special_tokens='{names[0]}'"
    )
