"""SentencePiece (arXiv:1808.06226), set up so that text round-trips byte for byte."""

import io
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import sentencepiece

from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer.base import Tokenizer, TrainingText, text_ids

MODEL_FILE = "sentencepiece.model"
END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 16_000_000  # of text to train on: more takes longer and hardly changes the pieces
CUTS = (("one line\n", "and another"), ("two", " words"), ("x = 1\n", "def f(x):\n  return"))
MAX_LINE_BYTES = 4192  # SentencePiece skips longer ones


class SentencePieceTokenizer(Tokenizer):
    """A trained SentencePiece model. U+2581 is its mark for a space, so it comes back as one."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, where: str = MODEL_FILE):
        try:
            self.processor = sentencepiece.SentencePieceProcessor()
            self.processor.LoadFromSerializedProto(model)
            self.vocab_size = self.processor.vocab_size()
            pieces = [self.processor.id_to_piece(i) for i in range(self.vocab_size)]
        except (RuntimeError, ValueError) as e:  # ValueError: a piece that is not UTF-8
            raise BadInput(f"{where} is not a SentencePiece model") from e
        self.model = model
        self.special = {p: i for i, p in enumerate(pieces) if self.processor.is_control(i)}
        special = (self.processor.bos_id(), self.processor.eos_id())
        self.end_of_text = next((i for i in special if i >= 0), -1)
        self.cuttable = all(
            [*self.encode(a), *self.encode(b)] == [*self.encode(a + b)] for a, b in CUTS
        )
        if self.end_of_text < 0:
            raise BadInput(f"{where} has neither a bos nor an eos piece to serve as end-of-text")

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.processor.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # SentencePiece releases the GIL
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Iterable) -> str:
        return self.processor.decode(text_ids(ids, self))

    def token_bytes(self, token: int) -> bytes:
        if self.processor.is_byte(token):
            return bytes([int(self.processor.id_to_piece(token)[3:5], 16)])
        return super().token_bytes(token)

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
        cls, texts: Sequence[TrainingText], model_type: str, vocab_size: int
    ) -> "SentencePieceTokenizer":
        """Returns a `bpe` or `unigram` model of exactly `vocab_size` pieces, trained on a sample.

        No normalisation, no dummy prefix, every space kept, bytes as a fallback: text round-trips.
        Lines are sampled at random with a fixed seed, about SAMPLE_BYTES of them, shared among the
        texts by weight. `unigram` is arXiv:1804.10959.

        Raises:
          BadInput: if the text is too small for so many pieces.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sample_lines(texts),
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
                unk_id=0,
                bos_id=1,
                bos_piece=END_OF_TEXT,
                eos_id=-1,
                pad_id=-1,
                num_threads=os.cpu_count(),
                minloglevel=2,
            )
        except RuntimeError as e:
            raise BadInput(
                f"data.tokenizer=sentencepiece:{model_type}:{vocab_size} does not fit this corpus"
                f" ({sum(text.num_bytes for text in texts):,} bytes): {_reason(str(e))}"
            ) from e
        return cls(model.getvalue())


def _sample_lines(texts: Sequence[TrainingText]) -> Iterator[str]:
    """Yields a seeded sample of the lines, without their newlines (always a piece of their own).

    Long lines are cut. NUL means something else to SentencePiece: the byte fallback encodes it.
    """
    generator = random.Random(0)
    for text in texts:
        share = SAMPLE_BYTES * text.weight / max(text.num_bytes, 1)
        for line in (line for document in text.documents() for line in document.split("\n")):
            if line and (share >= 1 or generator.random() < share):
                line = line.replace("\0", "")
                for start in range(0, len(line), MAX_LINE_BYTES // 4):  # 4 bytes a character
                    yield line[start : start + MAX_LINE_BYTES // 4]


def _reason(message: str) -> str:
    if "too high" in message:
        return message[message.index("Vocabulary size") :].rstrip()
    if "required_chars" in message:
        return "it has more distinct characters than that; choose a larger size"
    return message.splitlines()[-1]
