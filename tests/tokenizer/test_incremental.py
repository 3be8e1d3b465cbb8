"""A stream of ids becomes the text of all of them, whatever the tokenizer and wherever it is
cut."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from jaxgpt.tokenizer import IncrementalDetokenizer, decode_prompt, make_tokenizer
from tests.conftest import CORPUS
from tests.tokenizer.test_tokenizers import dummy_prefix_model, gpt2_folder, hf_folder, made  # noqa: F401

KINDS = [
    "byte",
    "char",
    "sentencepiece",
    "unigram",
    "gpt2",
    "sentencepiece file",
    "hf bytes",
    "hf fallback",
    "special",
]
WORDS = [
    "日本語",
    "naïve",
    " the",
    "the ",
    "🤗",
    "€uro",
    "  ",
    "\n",
    "License",
    " a",
    "\ufffd",
    "中",
]
TEXT = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


def llama_like(pieces: list[str]) -> dict:
    """A tokenizer.json of Llama 2's kind: spaces are U+2581, unknown characters are bytes."""
    spaced = [piece.replace(" ", "\u2581") for piece in pieces]
    names = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *spaced]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    fast = FastTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return json.loads(fast.to_str())


@pytest.fixture(scope="module")
def every(made, gpt2_folder, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("growing")
    (folder / "m.model").write_bytes(dummy_prefix_model())
    byte_level = json.loads(made["gpt2"].fast.to_str())
    pieces = [*"abcdefghijklmnopqrstuvwxyzL \n"]
    for name, content, end in (
        ("bytes", byte_level, made["gpt2"].end_of_text),
        ("fallback", llama_like(pieces), 1),
    ):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(json.dumps(content))
        (folder / name / "end_of_text.json").write_text(json.dumps({"end_of_text": end}))
    file = f"sentencepiece:{folder}/m.model"
    return made | {
        "sentencepiece file": make_tokenizer(file),
        "hf bytes": make_tokenizer(f"hf:{folder}/bytes"),
        "hf fallback": make_tokenizer(f"hf:{folder}/fallback"),
        "special": make_tokenizer(file, special_tokens="<|a|>,<|b|>"),
    }


def streamed(tokenizer, before, ids) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, before, decode_prompt(tokenizer, before))
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(text=TEXT)
def test_a_stream_is_the_whole_text_at_every_cut(every, kind, text):
    tokenizer = every[kind]
    ids = tokenizer.encode(text).tolist()
    whole = tokenizer.decode(ids)
    for cut in range(len(ids) + 1):
        pieces = streamed(tokenizer, ids[:cut], ids[cut:])
        assert decode_prompt(tokenizer, ids[:cut]) + "".join(pieces) == whole
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_stream_as_they_decode(every, kind, data):
    """Broken bytes and ids of a larger vocabulary too, as an untrained model draws them."""
    tokenizer = every[kind]
    of_bytes = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    some = st.one_of(st.integers(-1, tokenizer.vocab_size + 130), st.sampled_from(of_bytes or [0]))
    ids = data.draw(st.lists(some, max_size=30))
    pieces = streamed(tokenizer, [], ids)
    whole = tokenizer.decode(np.array(ids, np.int64))
    assert "".join(pieces) == whole
    known = [i for i in ids if 0 <= i < tokenizer.vocab_size]
    assert whole == tokenizer.decode(known)


def test_an_unknown_id_is_no_special_token(every):
    tokenizer = every["special"]
    ids = [*tokenizer.encode("a").tolist(), 422, *tokenizer.encode(" the").tolist()]
    assert "".join(streamed(tokenizer, [], ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_as_soon_as_it_is_certain(every, kind):
    """A character's bytes are held until the last of them, words not at all (a run of fallback
    bytes of an hf tokenizer is decoded as one: until it ends)."""
    tokenizer = every[kind]
    ids = tokenizer.encode("日本 a").tolist()
    pieces = streamed(tokenizer, [], ids)
    if kind == "char":  # of another alphabet
        assert pieces == ["\ufffd", "\ufffd", " ", "a", ""]
    else:
        assert pieces[-1] == "" and pieces[-2].endswith("a")
    if kind in ("byte", "sentencepiece", "sentencepiece file"):
        assert [piece for piece in pieces if piece][:2] == ["日", "本"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(text=TEXT)
def test_the_bytes_of_tokens_are_the_text(every, kind, text):
    tokenizer = every[kind]
    ids = tokenizer.encode(f"x{text}").tolist()
    joined = b"".join(tokenizer.token_bytes(i) for i in ids).decode()
    assert joined.removeprefix(" ") == tokenizer.decode(ids)


def test_a_continuation_keeps_its_first_word_s_space(every):
    tokenizer = every["sentencepiece file"]
    ids = tokenizer.encode("the License shall").tolist()
    prompt = tokenizer.encode("the License").tolist()
    assert ids[: len(prompt)] == prompt
    assert "".join(streamed(tokenizer, prompt, ids[len(prompt) :])) == " shall"


@pytest.mark.parametrize("kind", ["sentencepiece file", "hf bytes", "gpt2"])
def test_long_streams_take_linear_time(every, monkeypatch, kind):
    """Each id is decoded a few times, whatever stands before it."""
    tokenizer, decoded = every[kind], []
    plain = type(tokenizer).decode

    def counted(self, ids):
        decoded.append(len(ids))
        return plain(self, ids)

    ids = tokenizer.encode(CORPUS[:3000]).tolist()
    detokenizer = IncrementalDetokenizer(tokenizer)
    monkeypatch.setattr(type(tokenizer), "decode", counted)
    text = "".join(detokenizer.add(i) for i in ids)
    assert text == CORPUS[:3000] and sum(decoded) < 12 * len(ids)
