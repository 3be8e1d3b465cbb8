"""GPT-2's byte-level BPE, from OpenAI's or Hugging Face's files."""

import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from jaxgpt.system.errors import BadInput, as_bad_input
from jaxgpt.system.files import read_json
from jaxgpt.tokenizer.base import Tokenizer, text_ids

END_OF_TEXT = "<|endoftext|>"
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes written as they are
_OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}
FILE_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


class Gpt2Tokenizer(Tokenizer):
    """Byte-level BPE (Radford et al. 2019, 2.2). `<|endoftext|>` in a text is plain text."""

    kind = "gpt2"
    cuttable = True  # its pattern never joins a line break or a single space to what is before

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], where: str):
        if END_OF_TEXT not in vocab:
            raise BadInput(f"the vocabulary in {where} lacks {END_OF_TEXT}")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise BadInput(f"the vocabulary in {where} does not number its pieces 0, 1, 2, ...")
        if missing := sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()):
            raise BadInput(
                f"the vocabulary in {where} lacks {len(missing)} of the 256 pieces that stand for"
                f" bytes, for example {missing[0]!r}: text would be lost"
            )
        self.vocab, self.merges = vocab, merges
        self.vocab_size, self.end_of_text = len(vocab), vocab[END_OF_TEXT]
        with as_bad_input(lambda e: f"the merges in {where} do not fit its vocabulary: {e}"):
            self.fast = FastTokenizer(models.BPE(vocab=vocab, merges=merges))
        self.fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.fast.decoder = decoders.ByteLevel()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return fast_encode(self.fast, texts)

    def decode(self, ids: Iterable) -> str:
        return self.fast.decode(text_ids(ids, self))

    def token_bytes(self, token: int) -> bytes:
        return bytes_of_piece(self.fast.id_to_token(token))

    def save(self, folder: os.PathLike) -> None:
        vocab_file, merges_file = FILE_PAIRS[0]
        (folder / vocab_file).write_text(json.dumps(self.vocab, ensure_ascii=False), "utf-8")
        lines = "".join(f"{a} {b}\n" for a, b in self.merges)
        (folder / merges_file).write_text("#version: 0.2\n" + lines, "utf-8")

    @classmethod
    def open(cls, folder: os.PathLike) -> "Gpt2Tokenizer":
        """Reads GPT-2's vocabulary, under any of the three sets of file names in use."""
        if not folder.is_dir():
            raise BadInput(f"tokenizer folder {folder} does not exist")
        try:
            for vocab_file, merges_file in FILE_PAIRS:
                if (folder / vocab_file).is_file() and (folder / merges_file).is_file():
                    vocab = read_json(folder / vocab_file, {str: int})
                    lines = (folder / merges_file).read_text("utf-8").split("\n")
                    lines = [line for line in lines if line and not line.startswith("#version")]
                    return cls(vocab, [tuple(line.split(" ")) for line in lines], str(folder))
            if (folder / "tokenizer.json").is_file():
                schema = {"model": {"vocab": {str: int}, "merges": [str | list]}}
                model = read_json(folder / "tokenizer.json", schema)["model"]
                merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
                return cls(model["vocab"], merges, str(folder))
        except (ValueError, TypeError) as e:
            raise BadInput(f"the GPT-2 vocabulary in {folder} is damaged: {e}") from e
        raise BadInput(
            f"{folder} holds no GPT-2 vocabulary: expected vocab.json + merges.txt,"
            " encoder.json + vocab.bpe, or tokenizer.json"
        )


def bytes_of_piece(piece: str) -> bytes:
    """Returns the bytes that a piece of a byte-level vocabulary spells."""
    return b"".join(bytes([BYTES[c]]) if c in BYTES else c.encode() for c in piece)


def fast_encode(fast: FastTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text, int32, without the special tokens that a template adds."""
    encodings = fast.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.asarray(encoding.ids, np.int32) for encoding in encodings]
