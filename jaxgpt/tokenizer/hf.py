"""Any tokenizer that Hugging Face's `tokenizers` library reads from a tokenizer.json."""

import json
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.system.errors import BadInput, as_bad_input
from jaxgpt.system.files import read_json
from jaxgpt.tokenizer.base import Tokenizer, strip_incomplete, text_ids
from jaxgpt.tokenizer.gpt2 import bytes_of_piece, fast_encode

FILE, SETTINGS = "tokenizer.json", "end_of_text.json"
MAX_IDS = 1 << 24  # sixty times the largest vocabulary in use


class HfTokenizer(Tokenizer):
    """A tokenizer.json, used as it is, but with truncation and padding switched off.

    Names of special tokens in a text are plain text. Text comes back from its ids unless the
    file's normaliser changes it, its pre-tokenizer adds a space or its vocabulary lacks something.
    """

    kind = "hf"
    cuttable = False  # where its pattern lets a text be cut is not known

    def __init__(self, text: str, end_of_text: int, where: str):
        with as_bad_input(lambda e: f"{where} is not a tokenizer: {e}"):
            self.fast = FastTokenizer.from_str(text)
        self.fast.encode_special_tokens = True
        self.fast.no_truncation()
        self.fast.no_padding()
        self.text, self.end_of_text, self.where = text, end_of_text, where
        pieces = self.fast.get_vocab(with_added_tokens=True)
        fallback = "ByteFallback" in repr(self.fast.decoder)
        self.bytes = {  # of pieces like <0xE6>
            id_: int(piece[3:5], 16)
            for piece, id_ in pieces.items()
            if fallback and re.fullmatch("<0x[0-9A-F]{2}>", piece)
        }
        self.is_byte_level = "ByteLevel" in repr(self.fast.decoder)
        self.vocab_size = max(pieces.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MAX_IDS:
            raise BadInput(f"{where} has token {self.vocab_size - 1:,} of at most {MAX_IDS:,}")
        if not 0 <= end_of_text < self.vocab_size:
            raise BadInput(f"{where} has no token {end_of_text} to serve as end-of-text")
        added = self.fast.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        special.pop(_unknown_id(self.fast.model), None)  # plain text may contain unknown tokens
        special[end_of_text] = self.fast.id_to_token(end_of_text) or ""
        self.special = {name: i for i, name in special.items() if name}
        self.special_ids = np.array(sorted(special), np.int32)
        names = sorted(filter(None, special.values()), key=len, reverse=True)
        splits = [f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names]
        self.inside_names = re.compile("|".join(splits) or "(?!)")  # after each's first character

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # e.g. a vocabulary that lacks its own token for unknown text
        with as_bad_input(lambda e: f"{self.where} cannot encode the text: {e}"):
            all_ids = fast_encode(self.fast, texts)
        return [self._without_special(text, ids) for text, ids in zip(texts, all_ids, strict=True)]

    def _without_special(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Returns `ids`, or if they hold special tokens, ids of the same `text` without them.

        Some models (Unigram, WordLevel) hold special tokens as ordinary pieces. The text is then
        split inside their names, after the first character; ids that a normaliser still turns into
        special tokens are dropped.
        """
        if not np.isin(ids, self.special_ids).any():
            return ids
        parts = [part for part in self.inside_names.split(text) if part]
        ids = np.concatenate([np.zeros(0, np.int32), *fast_encode(self.fast, parts)])
        return ids[~np.isin(ids, self.special_ids)]

    def decode(self, ids: Iterable) -> str:
        return self.fast.decode(text_ids(ids, self), skip_special_tokens=False)

    def decode_stable(self, ids: Iterable) -> str:
        ids = text_ids(ids, self)
        while ids and ids[-1] in self.bytes:  # a run of bytes is decoded as one, or not at all
            ids.pop()
        return strip_incomplete(self.decode(ids))

    def token_bytes(self, token: int) -> bytes:
        if token in self.bytes:
            return bytes([self.bytes[token]])
        if self.is_byte_level:
            return bytes_of_piece(self.fast.id_to_token(token) or "")
        return super().token_bytes(token)

    def save(self, folder: os.PathLike) -> None:
        (folder / FILE).write_bytes(self.text.encode())
        (folder / SETTINGS).write_text(json.dumps({"end_of_text": self.end_of_text}))

    @classmethod
    def open(cls, folder: os.PathLike) -> "HfTokenizer":
        """Reads what `save` wrote, or a model folder: its config names the end-of-text token.
        Raises `BadInput` if there is no tokenizer.json, or nothing says which token ends a text."""
        file = folder / FILE
        if not file.is_file():
            raise BadInput(f"{folder} holds no {FILE}")
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError as e:
            raise BadInput(f"{file} is not a tokenizer: it is not UTF-8") from e
        return cls(text, _end_of_text(folder), str(file))


def _unknown_id(model) -> int | None:
    """Returns the id that a model gives to text outside its vocabulary."""
    if match := re.match(r"Unigram\(unk_id=(\d+)", repr(model)):
        return int(match[1])
    token = getattr(model, "unk_token", None)
    return None if token is None else model.token_to_id(token)


def _end_of_text(folder) -> int:
    for name, key in (
        (SETTINGS, "end_of_text"),
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
        ("config.json", "bos_token_id"),
    ):
        value = read_json(folder / name, dict).get(key) if (folder / name).is_file() else None
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int:
            return value
    raise BadInput(f"nothing in {folder} names its end-of-text token (eos_token_id)")
