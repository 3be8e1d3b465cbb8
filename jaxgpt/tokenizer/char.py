"""One token per character of the training text."""

import json
import os
from collections.abc import Iterable, Sequence

import numpy as np

from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged, read_json
from jaxgpt.tokenizer.base import HALF, TrainingText, known

VOCAB_FILE = "characters.json"
MOST = 65_000  # beyond, it is no longer a vocabulary of characters


class CharTokenizer:
    """Characters by code point, then one id for any other character, then end-of-text.

    The exception to the round trip: a character that the training text lacks comes back as
    U+FFFD.
    """

    kind = "char"
    cuttable = True

    def __init__(self, characters: str):
        self.characters = characters
        self.points = np.array([ord(c) for c in characters], np.int32)
        self.unknown = len(characters)
        self.end_of_text = len(characters) + 1
        self.vocab_size = len(characters) + 2

    def encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), np.int32)
        ids = np.searchsorted(self.points, points)
        known = self.points[np.minimum(ids, self.unknown - 1)] == points
        return np.where(known, ids, self.unknown).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable) -> str:
        table = self.characters + HALF
        return "".join(table[i] for i in known(ids, self))

    def settled(self, ids: Iterable) -> str:
        return self.decode(ids)

    def token_bytes(self, token: int) -> bytes:
        return self.decode([token]).encode()

    def save(self, folder: os.PathLike) -> None:
        (folder / VOCAB_FILE).write_text(json.dumps(self.characters))

    @classmethod
    def open(cls, folder: os.PathLike) -> "CharTokenizer":
        characters = read_json(folder / VOCAB_FILE, str)
        if not characters or characters != "".join(sorted(set(characters))):
            raise Damaged(folder / VOCAB_FILE, "its characters are none or not in order")
        return cls(characters)

    @classmethod
    def train(cls, texts: Sequence[TrainingText]) -> "CharTokenizer":
        """Returns the tokenizer of every character in `texts`.

        Raises:
          BadInput: if they are so many that this is not what the user wants.
        """
        found: set[str] = set()
        for text in texts:
            for document in text.documents():
                found.update(document)
        if len(found) > MOST:
            raise BadInput(
                f"data.tokenizer=char found {len(found):,} characters; use sentencepiece:N"
            )
        return cls("".join(sorted(found)))
