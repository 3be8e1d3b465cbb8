"""Any tokenizer that Hugging Face's `tokenizers` library reads from a tokenizer.json."""

import json
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.config import BadInput
from jaxgpt.tokenizer.base import known, without_half
from jaxgpt.tokenizer.gpt2 import bytes_of

FILE, SETTINGS = "tokenizer.json", "end_of_text.json"


class HfTokenizer:
    """A tokenizer.json, used as it is; names of special tokens in a text are plain text."""

    kind = "hf"
    cuttable = False  # its pattern is not known

    def __init__(self, text: str, end_of_text: int, where: str):
        try:
            self.fast = FastTokenizer.from_str(text)
        except Exception as e:  # the library raises bare Exception
            raise BadInput(f"{where} is not a tokenizer: {e}") from e
        self.fast.encode_special_tokens = True
        self.text, self.end_of_text = text, end_of_text
        pieces = self.fast.get_vocab(with_added_tokens=True)
        fallback = "ByteFallback" in repr(self.fast.decoder)
        self.bytes = {  # of pieces like <0xE6>
            id_: int(piece[3:5], 16)
            for piece, id_ in pieces.items()
            if fallback and re.fullmatch("<0x[0-9A-F]{2}>", piece)
        }
        self.is_byte_level = "ByteLevel" in repr(self.fast.decoder)
        self.vocab_size = max(pieces.values()) + 1
        if not 0 <= end_of_text < self.vocab_size:
            raise BadInput(f"{where} has no token {end_of_text} to serve as end-of-text")

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.fast.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self.fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in found]

    def decode(self, ids: Iterable) -> str:
        return self.fast.decode(known(ids, self), skip_special_tokens=False)

    def settled(self, ids: Iterable) -> str:
        ids = known(ids, self)
        while ids and ids[-1] in self.bytes:  # a run of bytes is decoded as one, or not at all
            ids.pop()
        return without_half(self.decode(ids))

    def token_bytes(self, token: int) -> bytes:
        if token in self.bytes:
            return bytes([self.bytes[token]])
        if self.is_byte_level:
            return bytes_of(self.fast.id_to_token(token) or "")
        return self.decode([token, token])[len(self.decode([token])) :].encode()

    def save(self, folder: os.PathLike) -> None:
        (folder / FILE).write_text(self.text)
        (folder / SETTINGS).write_text(json.dumps({"end_of_text": self.end_of_text}))

    @classmethod
    def open(cls, folder: os.PathLike) -> "HfTokenizer":
        """Reads what `save` wrote, or a model folder: its config names the end-of-text token.

        Raises:
          BadInput: if there is no tokenizer.json, or nothing says which token ends a text.
        """
        if not (folder / FILE).is_file():
            raise BadInput(f"{folder} holds no {FILE}")
        return cls((folder / FILE).read_text("utf-8"), _end_of_text(folder), str(folder / FILE))


def _end_of_text(folder) -> int:
    for name, keys in (
        (SETTINGS, ("end_of_text",)),
        ("generation_config.json", ("eos_token_id",)),
        ("config.json", ("eos_token_id", "bos_token_id")),
    ):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text("utf-8"))
            for key in keys:
                value = found.get(key)
                value = value[0] if isinstance(value, list) and value else value
                if isinstance(value, int):
                    return value
    raise BadInput(f"nothing in {folder} names its end-of-text token (eos_token_id)")
