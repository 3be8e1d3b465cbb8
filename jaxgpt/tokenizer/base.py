"""What every tokenizer offers, and the simplest one."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np

from jaxgpt.system.errors import BadInput

REPLACEMENT = "\ufffd"  # decoders write it for bytes that are not a whole character
ROLES = {  # what a special token serves as, and its usual names, the one to suggest first
    "mask": ("[MASK]", "<mask>"),
    "cls": ("[CLS]", "<s>"),  # in front of a text that an encoder reads
    "sep": ("[SEP]", "</s>"),  # after it, and between two
    "pad": ("[PAD]", "<pad>"),
    "bos": ("<s>",),
    "eos": ("</s>",),
    "fim_prefix": ("<|fim_prefix|>", "<fim_prefix>"),
    "fim_suffix": ("<|fim_suffix|>", "<fim_suffix>"),
    "fim_middle": ("<|fim_middle|>", "<fim_middle>"),
    # These three are known only where a model folder says so
    "decoder_start": (),  # what a decoder reads before its first token
    "forced_bos": (),  # BART: the first token that a decoder must generate
    "forced_eos": (),  # BART: the token it must generate last, at the longest length
}
FIRST, SECOND = -1, -2  # the texts in a frame of special tokens


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """Text to train a tokenizer on: each call of `documents` reads it anew."""

    documents: Callable[[], Iterable[str]]
    num_bytes: int
    weight: float = 1.0  # its share of the sample that the tokenizer is trained on


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of every tokenizer. Ids run from 0 to `vocab_size` - 1."""

    kind: str
    vocab_size: int
    end_of_text: int  # the id in front of each document
    cuttable: bool  # encode(a + b) == encode(a) + encode(b) where `text.pieces.cut_at` cuts
    special: Mapping[str, int] = MappingProxyType({})  # ids of special tokens, by name
    roles: Mapping[str, int] = MappingProxyType({})  # what a model folder says of ROLES

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32; never `end_of_text`, whatever the text says."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of each text, on all cores where that is faster."""
        return [self.encode(text) for text in texts]

    def encode_with_special(self, text: str) -> np.ndarray:
        """Returns `encode`, but names of special tokens in the text are those tokens: `[MASK]`."""
        return encode_around(text, self.special, self.encode)

    def role(self, name: str) -> int | None:
        """Returns the id of the special token that serves as `name`, one of `ROLES`, None if there
        is none. Where nothing else ends or starts a decoder's text, `end_of_text` does."""
        usual = [self.special[n] for n in ROLES[name] if n in self.special]
        if name in self.roles or usual:
            return self.roles.get(name, *usual[:1])
        return self.end_of_text if name in ("eos", "decoder_start") else None

    def frame(self, is_pair: bool) -> list[tuple[int, int]]:
        """Returns the (id, type) of each token that a model expects around one text or two, with
        FIRST and SECOND in the texts' places: BERT's frame, as far as there are such tokens."""
        cls, sep = self.role("cls"), self.role("sep")
        sep = self.end_of_text if sep is None else sep
        start = [] if cls is None else [(cls, 0)]
        return [*start, (FIRST, 0), (sep, 0)] + is_pair * [(SECOND, 1), (sep, 1)]

    def decode(self, ids: Iterable) -> str:
        """Returns the text of `ids`; broken UTF-8 becomes U+FFFD. `end_of_text` and ids that are
        not the tokenizer's (a model's vocabulary may be larger) are dropped."""

    def decode_stable(self, ids: Iterable) -> str:
        """Returns the start of `decode(ids)` that stays the same whatever ids follow."""
        return strip_incomplete(self.decode(ids))

    def token_bytes(self, token: int) -> bytes:
        """Returns the UTF-8 of one id in the middle of a text; it may be part of a character."""
        return self.decode([token, token])[len(self.decode([token])) :].encode()

    def offsets(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Returns from which to which character of `text` each of its `ids` reaches, int32 [n, 2]:
        of a part of a character, that character. Raises `BadInput` if the tokenizer changes the
        text, so that nothing says where its tokens are."""
        if not len(ids):
            return np.zeros((0, 2), np.int32)
        of_id = {int(i): self.token_bytes(int(i)) for i in np.unique(ids)}
        pieces = [of_id[int(i)] for i in ids]
        joined, wanted = b"".join(pieces), text.encode()
        added = joined == b" " + wanted  # some models write a space in front of the text
        if joined != wanted and not added:
            raise BadInput(f"the tokenizer ({self.kind}) does not say where its tokens are in text")
        character = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - added
        starts = np.concatenate([[0], ends[:-1]])
        last = max(len(wanted) - 1, 0)
        spans = [character[np.clip(starts, 0, last)], character[np.clip(ends - 1, 0, last)] + 1]
        return np.stack(spans, axis=1).astype(np.int32)

    def save(self, folder: os.PathLike) -> None:
        """Writes the files that `open(folder)`, a class method, reads."""


def encode_around(
    text: str, special: Mapping[str, int], encode: Callable[[str], np.ndarray]
) -> np.ndarray:
    """Returns the ids of `text`: a name in `special` has its id, what is between `encode`'s."""
    longest_first = sorted(special, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if special else [text]
    ids = [[special[p]] if p in special else encode(p) for p in parts if p]
    return np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32)


def text_ids(ids: Iterable, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that stand for text: the tokenizer's own, without `end_of_text`."""
    end, size = tokenizer.end_of_text, tokenizer.vocab_size
    return [int(i) for i in ids if 0 <= i < size and i != end]


def strip_incomplete(text: str) -> str:
    """Returns `text` without the U+FFFD at its end that may stand for the first bytes of a
    character: one for all of them or one for each, so at most three."""
    for _ in range(3):
        text = text.removesuffix(REPLACEMENT)
    return text


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255, and 256 for end-of-text."""

    kind = "byte"
    vocab_size = 257
    end_of_text = 256
    cuttable = True

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable) -> str:
        return bytes(text_ids(ids, self)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes(text_ids([token], self))

    def save(self, folder: os.PathLike) -> None:
        pass

    @classmethod
    def open(cls, folder: os.PathLike) -> "ByteTokenizer":
        return cls()
