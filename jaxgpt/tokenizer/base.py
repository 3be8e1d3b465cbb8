"""The protocol, and the simplest tokenizer there is."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """Text to train a tokenizer on: each call of `documents` reads it anew."""

    documents: Callable[[], Iterable[str]]
    num_bytes: int
    weight: float = 1.0  # its share of a sample


@runtime_checkable
class Tokenizer(Protocol):
    """What every tokenizer offers. Ids run from 0 to `vocab_size` - 1."""

    kind: str
    vocab_size: int
    end_of_text: int  # the id in front of each document
    cuttable: bool  # encode(a + b) == encode(a) + encode(b) at `text.pieces.cut_at`'s places

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32; never `end_of_text`, whatever the text says."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of each text, on all cores."""

    def decode(self, ids: Iterable) -> str:
        """Returns the text of `ids`; `end_of_text` is dropped, broken UTF-8 becomes U+FFFD."""

    def save(self, folder: os.PathLike) -> None:
        """Writes the files that `open` needs."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 for end-of-text."""

    kind = "byte"
    vocab_size = 257
    end_of_text = 256
    cuttable = True

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: os.PathLike) -> None:
        pass

    @classmethod
    def open(cls, folder: os.PathLike) -> "ByteTokenizer":
        return cls()
