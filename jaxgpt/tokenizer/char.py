"""One token per character of the training text."""

import json
import os
from collections.abc import Iterable, Sequence

import numpy as np

from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged, read_json
from jaxgpt.tokenizer.base import REPLACEMENT, Tokenizer, TrainingText, text_ids

VOCAB_FILE = "characters.json"
MAX_CHARACTERS = 65_000


class CharTokenizer(Tokenizer):
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
        in_vocabulary = self.points[np.minimum(ids, self.unknown - 1)] == points
        return np.where(in_vocabulary, ids, self.unknown).astype(np.int32)

    def decode(self, ids: Iterable) -> str:
        table = self.characters + REPLACEMENT
        return "".join(table[i] for i in text_ids(ids, self))

    def decode_stable(self, ids: Iterable) -> str:
        return self.decode(ids)

    def offsets(self, text: str, ids: np.ndarray) -> np.ndarray:
        return np.stack([np.arange(len(ids)), np.arange(1, len(ids) + 1)], axis=1).astype(np.int32)

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
        """Returns the tokenizer of all characters in `texts`, at most `MAX_CHARACTERS`."""
        characters: set[str] = set()
        for text in texts:
            for document in text.documents():
                characters.update(document)
        if len(characters) > MAX_CHARACTERS:
            raise BadInput(
                f"data.tokenizer=char found {len(characters):,} characters; use sentencepiece:N"
            )
        return cls("".join(sorted(characters)))
