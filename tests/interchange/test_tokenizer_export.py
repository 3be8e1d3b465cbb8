"""Exported tokenizers give the same ids and texts there as here."""

import calendar
import csv
import functools
import inspect
import io
import random
import shlex
import string
import textwrap

import pytest
import sentencepiece

from jaxgpt.interchange.sentencepiece import fast_tokenizer
from jaxgpt.interchange.tokenizers import write_tokenizer
from jaxgpt.tokenizer.base import ByteTokenizer, TrainingText
from jaxgpt.tokenizer.char import CharTokenizer
from jaxgpt.tokenizer.sentencepiece import SentencePieceTokenizer
from jaxgpt.tokenizer.special import SpecialTokens
from tests.conftest import CORPUS

CODE = "".join(map(inspect.getsource, (calendar, csv, shlex, string, textwrap)))
TEXT = TrainingText(lambda: [CORPUS, CODE], len(CORPUS) + len(CODE))
CHUNKS = (
    *(
        "a",
        "aa",
        " ",
        "  ",
        "=",
        "==",
        "-",
        "\n",
        "\r",
        "\t",
        "é",
        "日本語",
        "\U0001f600",
        "\u2581",
    ),
    *("\0", "x" * 9, " " * 17, "\u2028", "e\u0301", "\ufeff", "1", "23", "    ", "\ud7ff"),
)


def texts() -> list[str]:
    """Some thousand lines of prose and code, whole documents, and characters of every kind."""
    chance = random.Random(0)
    mixed = ["".join(chance.choices(CHUNKS, k=chance.randrange(30))) for _ in range(1500)]
    anything = [
        "".join(chr(chance.randrange(0xD800) or 1) + chr(chance.randrange(0xE000, 0x110000)))
        for _ in range(1500)
    ]
    return [*(CORPUS + CODE).split("\n"), CORPUS, CODE, *mixed, *anything]


def trained(**options) -> SentencePieceTokenizer:
    """A model as other people train it, with SentencePiece's own defaults."""
    model, lines = io.BytesIO(), [line[:1000] for line in CORPUS.split("\n") if line]
    options = {"vocab_size": 400, "byte_fallback": True, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **options
    )
    return SentencePieceTokenizer(model.getvalue())


MODELS = {
    "bpe": lambda: SentencePieceTokenizer.train([TEXT], "bpe", 900),
    "unigram": lambda: SentencePieceTokenizer.train([TEXT], "unigram", 700),
    "llama's": lambda: trained(
        model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
}


def check(ours, encode, decode, name: str) -> None:
    """Every text has the same ids and back; a unigram model may choose among equal likelihoods.

    SentencePiece adds the scores in float32, `tokenizers` in float64: of two equal ways to cut a
    run of spaces, rounding picks one.
    """
    differing = []
    for text in texts():
        ids, theirs = ours.encode(text).tolist(), encode(text)
        assert decode(ids) == ours.decode(ids), repr(text)
        if theirs != ids:
            differing.append(text)
            assert decode(theirs) == decode(ids), repr(text)
            score = ours.processor.get_score
            assert sum(map(score, theirs)) == pytest.approx(sum(map(score, ids)), abs=1e-4), text
    most = len(texts()) // 50 if name == "unigram" else 0
    assert len(differing) <= most, differing


@functools.cache
def made(kind: str):
    return KINDS[kind]()


@pytest.mark.parametrize("name", MODELS)
def test_a_sentencepiece_model_is_the_same_there(name):
    fast = fast_tokenizer(made(name))
    check(
        made(name), lambda text: fast.encode(text, add_special_tokens=False).ids, fast.decode, name
    )


@pytest.mark.parametrize("options", [{"model_type": "word"}, {"model_type": "char"}])
def test_what_cannot_be_the_same_is_said(tmp_path, options):
    ours = trained(vocab_size=50, byte_fallback=False, hard_vocab_limit=False, **options)
    note = write_tokenizer(ours, tmp_path, 64, "")
    assert (
        "a tokenizer.json cannot express this SentencePiece model" in note
        and str(tmp_path) not in note
    )
    assert [file.name for file in tmp_path.iterdir()] == ["sentencepiece.model"]


KINDS = {
    **MODELS,
    "byte": ByteTokenizer,
    "char": lambda: CharTokenizer.train([TEXT]),
    "special": lambda: SpecialTokens(MODELS["bpe"](), ["<|im_start|>", "<|im_end|>"]),
}


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it(tmp_path, kind):
    from transformers import AutoTokenizer

    ours = made(kind)
    assert write_tokenizer(ours, tmp_path, 64, "") == ""
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.end_of_text
    check(
        ours, lambda text: theirs(text, add_special_tokens=False)["input_ids"], theirs.decode, kind
    )
    if kind == "special":
        assert theirs("<|im_end|>")["input_ids"] == [ours.special["<|im_end|>"]]
