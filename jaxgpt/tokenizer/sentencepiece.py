"""SentencePiece (arXiv:1808.06226), set up so that text round-trips byte for byte."""

import io
import os
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece

from jaxgpt.config import BadInput

MODEL_FILE = "sentencepiece.model"
END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 16_000_000  # of text to train on: beyond, pieces hardly change but time does
MAX_LINE_BYTES = 4192  # SentencePiece skips longer ones


class SentencePieceTokenizer:
    """A trained SentencePiece model. U+2581 in a text comes back as a space: it is its mark."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, where: str = MODEL_FILE):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise BadInput(f"{where} is not a SentencePiece model") from e
        self.model = model
        self.vocab_size = self.processor.vocab_size()
        special = (self.processor.bos_id(), self.processor.eos_id())
        self.end_of_text = next((i for i in special if i >= 0), -1)
        if self.end_of_text < 0:
            raise BadInput(f"{where} has neither a bos nor an eos piece to serve as end-of-text")

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.processor.encode(text), np.int32)

    def decode(self, ids: Iterable) -> str:
        return self.processor.decode([int(i) for i in ids if i != self.end_of_text])

    def save(self, folder: os.PathLike) -> None:
        (folder / MODEL_FILE).write_bytes(self.model)

    @classmethod
    def open(cls, folder: os.PathLike) -> "SentencePieceTokenizer":
        return cls.from_file(folder / MODEL_FILE)

    @classmethod
    def from_file(cls, file: os.PathLike) -> "SentencePieceTokenizer":
        if not file.is_file():
            raise BadInput(f"SentencePiece model {file} does not exist")
        return cls(file.read_bytes(), str(file))

    @classmethod
    def train(
        cls, documents: Iterable[str], size_in_bytes: int, model_type: str, vocab_size: int
    ) -> "SentencePieceTokenizer":
        """Returns a `bpe` or `unigram` model of exactly `vocab_size` pieces, trained on a sample.

        No normalisation, no dummy prefix, every space kept, bytes as a fallback: text
        round-trips. The sample is every n-th line, so that it fits SAMPLE_BYTES. `unigram` is
        arXiv:1804.10959.

        Raises:
          BadInput: if the text is too small for so many pieces.
        """
        every = -(-size_in_bytes // SAMPLE_BYTES)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sample_lines(documents, every),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                split_digits=True,
                user_defined_symbols=["\n"],
                character_coverage=0.9999,
                max_sentence_length=MAX_LINE_BYTES,
                unk_id=0, bos_id=1, bos_piece=END_OF_TEXT, eos_id=-1, pad_id=-1,
                num_threads=os.cpu_count(),
                minloglevel=2,
            )  # fmt: skip
        except RuntimeError as e:
            raise BadInput(
                f"data.tokenizer=sentencepiece:{model_type}:{vocab_size} does not fit this corpus"
                f" ({size_in_bytes:,} bytes): {_reason(str(e))}"
            ) from e
        return cls(model.getvalue())


def _sample_lines(documents: Iterable[str], every: int) -> Iterator[str]:
    """Yields every n-th line without its newline (a piece of its own) and cut to a usable length.

    SentencePiece hands NUL a meaning of its own, so it is left to the byte fallback.
    """
    lines = (line for text in documents for line in text.split("\n"))
    for number, line in enumerate(lines):
        if number % every == 0 and line:
            line = line.replace("\0", "")
            for start in range(0, len(line), MAX_LINE_BYTES // 4):  # 4 bytes a character at most
                yield line[start : start + MAX_LINE_BYTES // 4]


def _reason(message: str) -> str:
    if "too high" in message:
        return message[message.index("Vocabulary size") :].rstrip()
    if "smaller than required_chars" in message or "required_chars" in message:
        return "it has more distinct characters than that; choose a larger size"
    return message.splitlines()[-1]
