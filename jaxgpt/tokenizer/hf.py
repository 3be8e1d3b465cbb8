"""Any tokenizer that Hugging Face's `tokenizers` library reads from a tokenizer.json, or makes of
BERT's, RoBERTa's or T5's own files."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.system.errors import BadInput, as_bad_input
from jaxgpt.system.files import read_json
from jaxgpt.tokenizer.base import FIRST, SECOND, Tokenizer, strip_incomplete, text_ids
from jaxgpt.tokenizer.gpt2 import bytes_of_piece, fast_encode
from jaxgpt.tokenizer.hf_files import built, roles_of

FILE, SETTINGS = "tokenizer.json", "end_of_text.json"
MAX_IDS = 1 << 24  # sixty times the largest vocabulary in use


class HfTokenizer(Tokenizer):
    """A tokenizer.json, used as it is, but with truncation and padding switched off.

    Names of special tokens in a text are plain text. Text comes back from its ids unless the
    file's normaliser changes it, its pre-tokenizer adds a space or its vocabulary lacks something:
    BERT's comes back in lower case and with a space between any two words, T5's with one for many.
    """

    kind = "hf"
    cuttable = False  # where its pattern lets a text be cut is not known

    def __init__(
        self, text: str, end_of_text: int, where: str, roles: dict[str, int] | None = None
    ):
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
        if bad := {n: i for n, i in (roles or {}).items() if not 0 <= i < self.vocab_size}:
            raise BadInput(f"{where} has no tokens {bad}")
        added = self.fast.get_added_tokens_decoder()
        self.roles = roles or {}
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

    def encode_with_special(self, text: str) -> np.ndarray:
        with as_bad_input(lambda e: f"{self.where} cannot encode the text: {e}"):
            return fast_encode(self.marking, [text])[0]

    @cached_property
    def marking(self) -> FastTokenizer:
        """The same tokenizer, to which names of special tokens in a text are those tokens."""
        fast = FastTokenizer.from_str(self.text)
        fast.no_truncation()
        fast.no_padding()
        return fast

    def frame(self, is_pair: bool) -> list[tuple[int, int]]:
        texts = ("a", "a") if is_pair else ("a",)
        found = self.fast.encode(*texts, add_special_tokens=True)
        frame: list[tuple[int, int]] = []
        for token, sequence, kind in zip(found.ids, found.sequence_ids, found.type_ids):
            item = (token if sequence is None else (FIRST, SECOND)[sequence], kind)
            if sequence is None or item not in frame:
                frame.append(item)
        return frame if len(frame) > len(texts) else super().frame(is_pair)

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

    def offsets(self, text: str, ids: np.ndarray) -> np.ndarray:
        encoding = self.fast.encode(text, add_special_tokens=False)
        if not np.array_equal(encoding.ids, ids):  # names of special tokens in the text
            return super().offsets(text, ids)
        return np.array(encoding.offsets, np.int32).reshape(-1, 2)

    def save(self, folder: os.PathLike) -> None:
        (folder / FILE).write_bytes(self.text.encode())
        settings = {"end_of_text": self.end_of_text} | ({"roles": self.roles} if self.roles else {})
        (folder / SETTINGS).write_text(json.dumps(settings))

    @classmethod
    def open(cls, folder: os.PathLike) -> "HfTokenizer":
        """Reads what `save` wrote, or a model folder: its config names the end-of-text token, else
        its separator is that.
        Raises `BadInput` if there is no tokenizer, or nothing says which token ends a text."""
        file = folder / FILE
        if file.is_file():
            try:
                text = file.read_bytes().decode()
            except UnicodeDecodeError as e:
                raise BadInput(f"{file} is not a tokenizer: it is not UTF-8") from e
        elif fast := built(folder):
            file, text = folder, fast.to_str()
        else:
            raise BadInput(f"{folder} holds no {FILE}")
        if (folder / SETTINGS).is_file():
            saved = read_json(folder / SETTINGS, {"end_of_text": int, "roles?": {str: int}})
            return cls(text, saved["end_of_text"], str(file), saved.get("roles"))
        named, end = roles_of(folder), _end_of_text(folder)
        if end is not None and not named:
            return cls(text, end, str(file))
        plain = cls(text, 0, str(file))
        roles = {role: plain.special.get(token, token) for role, token in named.items()}
        roles = {role: i for role, i in roles.items() if i in range(plain.vocab_size)}
        end = roles.get("sep", plain.special.get("[SEP]")) if end is None else end
        if end is None:
            raise BadInput(f"nothing in {folder} names its end-of-text token (eos_token_id)")
        return cls(text, end, str(file), roles)


def _unknown_id(model) -> int | None:
    """Returns the id that a model gives to text outside its vocabulary."""
    if match := re.match(r"Unigram\(unk_id=(\d+)", repr(model)):
        return int(match[1])
    token = getattr(model, "unk_token", None)
    return None if token is None else model.token_to_id(token)


def _end_of_text(folder) -> int | None:
    for name, key in (
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
        ("config.json", "bos_token_id"),
    ):
        value = read_json(folder / name, dict).get(key) if (folder / name).is_file() else None
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int:
            return value
    return None
