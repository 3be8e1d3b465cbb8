"""Every tokenizer gives the text back, and survives being saved."""

import io
import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxgpt.system.errors import BadInput
from jaxgpt.text.pieces import cut_at
from jaxgpt.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.base import TrainingText
from jaxgpt.tokenizer.gpt2 import Gpt2Tokenizer
from jaxgpt.tokenizer.hf import HfTokenizer
from jaxgpt.tokenizer.load import check_spec, describes, vocabulary_size
from jaxgpt.tokenizer.special import SpecialTokens, special_id
from tests.conftest import CORPUS


def text_of(text: str) -> TrainingText:
    return TrainingText(lambda: iter([text]), len(text))


CUTTABLE = ["byte", "char", "sentencepiece", "unigram", "gpt2"]
KINDS = [*CUTTABLE, "hf"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A small vocabulary in OpenAI's spelling, made as GPT-2's was."""
    folder = tmp_path_factory.mktemp("gpt2")
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator([CORPUS], trainer)
    model = json.loads(fast.to_str())["model"]
    vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    merges = [tuple(m) for m in model["merges"]]
    (folder / "encoder.json").write_text(json.dumps(vocab))
    lines = "\n".join(" ".join(m) for m in merges)
    (folder / "vocab.bpe").write_text(f"#version: 0.2\n{lines}\n")
    return folder


@pytest.fixture(scope="module")
def hf_folder(gpt2_folder, tmp_path_factory):
    """The same vocabulary as a tokenizer.json, which also truncates and pads."""
    folder = tmp_path_factory.mktemp("hf")
    gpt2 = Gpt2Tokenizer.open(gpt2_folder)
    fast = FastTokenizer(models.BPE(vocab=gpt2.vocab, merges=gpt2.merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|endoftext|>"])
    fast.enable_truncation(5)
    fast.enable_padding(length=9)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": gpt2.end_of_text}))
    return folder


@pytest.fixture(scope="module")
def made(gpt2_folder, hf_folder):
    return {
        "byte": make_tokenizer("byte"),
        "char": make_tokenizer("char", [text_of(CORPUS)]),
        "unigram": make_tokenizer("sentencepiece:unigram:400", [text_of(CORPUS)]),
        "sentencepiece": make_tokenizer("sentencepiece:400", [text_of(CORPUS)]),
        "gpt2": make_tokenizer(f"gpt2:{gpt2_folder}"),
        "hf": make_tokenizer(f"hf:{hf_folder}"),
    }


def as_decoded(kind: str, text: str) -> str:
    """The text itself, but for the two documented exceptions."""
    if kind in ("sentencepiece", "unigram"):
        return text.replace("\u2581", " ")  # SentencePiece's own mark for a space
    if kind == "char":
        return "".join(c if c in CORPUS else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_any_text_round_trips(made, kind, text):
    tokenizer = made[kind]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == as_decoded(kind, text)
    assert tokenizer.end_of_text not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_special_text_is_plain_text_and_end_of_text_is_dropped(made, kind):
    tokenizer = made[kind]
    text = "a<|endoftext|>b <s> </s> <unk> <0x0A>"
    ids = tokenizer.encode(text)
    text = as_decoded(kind, text)
    assert tokenizer.end_of_text not in ids and tokenizer.decode(ids) == text
    marked = [tokenizer.end_of_text, *ids, tokenizer.end_of_text]
    assert tokenizer.decode(marked) == text


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(made, kind, tmp_path):
    save_tokenizer(made[kind], tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert (again.vocab_size, again.end_of_text) == (made[kind].vocab_size, made[kind].end_of_text)
    np.testing.assert_array_equal(again.encode(CORPUS), made[kind].encode(CORPUS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_of_a_workdir(made, kind, tmp_path):
    """Of any kind, by the folder or by the workdir; its special tokens keep their ids."""
    save_tokenizer(made[kind], tmp_path / "plain/tokenizer")
    save_tokenizer(SpecialTokens(made[kind], ["<a>", "<b>"]), tmp_path / "w/tokenizer")
    size, expected = made[kind].vocab_size, made[kind].encode(CORPUS)
    for folder, names, known in (
        ("plain/tokenizer", "", []),
        ("plain", "<c>", ["<c>"]),
        ("w/tokenizer", "", ["<a>", "<b>"]),
        ("w", "<b>, <a>", ["<a>", "<b>"]),
        ("w", "<c>,<a>", ["<a>", "<b>", "<c>"]),
    ):
        spec = f"hf:{tmp_path / folder}"
        check_spec(spec)
        found = make_tokenizer(spec, special_tokens=names)
        assert (found.kind, found.end_of_text) == (made[kind].kind, made[kind].end_of_text)
        np.testing.assert_array_equal(found.encode(CORPUS), expected)
        own = {n: size + i for i, n in enumerate(known)}
        assert dict(found.special) == dict(made[kind].special) | own
        assert vocabulary_size(spec, names) == found.vocab_size == size + len(known)
        assert describes(spec, names, found)


def test_trained_size_is_exact_and_compresses(made):
    for kind in ("sentencepiece", "unigram"):
        assert made[kind].vocab_size == 400
        assert len(made[kind].encode(CORPUS)) < 0.6 * len(CORPUS)
    assert made["char"].vocab_size == len(set(CORPUS)) + 2


def test_sentencepiece_from_a_file(made, tmp_path):
    save_tokenizer(made["sentencepiece"], tmp_path)
    again = make_tokenizer(f"sentencepiece:{tmp_path / 'sentencepiece.model'}")
    np.testing.assert_array_equal(again.encode(CORPUS), made["sentencepiece"].encode(CORPUS))


def test_gpt2_spellings_agree(gpt2_folder, tmp_path):
    first = Gpt2Tokenizer.open(gpt2_folder)
    hugging, single = tmp_path / "h", tmp_path / "s"
    hugging.mkdir(), single.mkdir()
    first.save(hugging)
    assert (hugging / "vocab.json").exists()
    model = {"vocab": first.vocab, "merges": [list(m) for m in first.merges]}
    (single / "tokenizer.json").write_text(json.dumps({"model": model}))
    for folder in (hugging, single):
        np.testing.assert_array_equal(
            Gpt2Tokenizer.open(folder).encode(CORPUS), first.encode(CORPUS)
        )


def test_bad_tokenizers(tmp_path):
    (tmp_path / "junk.model").write_bytes(b"junk")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "encoder.json").write_text("{")
    (broken / "vocab.bpe").write_text("a b\n")
    for spec, message in (
        ("bite", "data.tokenizer='bite' is unknown"),
        ("sentencepiece:", "is unknown"),
        ("sentencepiece:20", "too small"),
        ("sentencepiece:no.model", "no.model does not exist"),
        (f"sentencepiece:{tmp_path / 'junk.model'}", "is not a SentencePiece model"),
        ("gpt2:nowhere", "nowhere does not exist"),
        (f"gpt2:{tmp_path}", "holds no GPT-2 vocabulary"),
        (f"gpt2:{broken}", "is damaged"),
    ):
        with pytest.raises(BadInput, match=message):
            check_spec(spec)


def test_vocabulary_larger_than_the_corpus_allows():
    with pytest.raises(BadInput, match="too high"):
        make_tokenizer("sentencepiece:5000", [text_of("a few words")])


@pytest.mark.parametrize("kind", CUTTABLE)
@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(["a", "bc", " ", "  ", "\n", "\n\n", "'s", "1", "é", "\t"])))
def test_a_cut_changes_no_token(made, kind, words):
    text, tokenizer = "".join(words), made[kind]
    assert tokenizer.cuttable
    if cut := cut_at(text):
        parts = tokenizer.encode_batch([text[:cut], text[cut:]])
        np.testing.assert_array_equal(np.concatenate(parts), tokenizer.encode(text))


def dummy_prefix_model() -> bytes:
    """A SentencePiece model as its trainer makes it by default: a space in front of the first word
    (its decoder drops it), bytes for characters that it does not know."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")),
        model_writer=model,
        vocab_size=420,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        minloglevel=2,
    )
    return model.getvalue()


def test_a_foreign_model_that_adds_a_space_is_not_cut(tmp_path):
    (tmp_path / "m.model").write_bytes(dummy_prefix_model())
    assert not make_tokenizer(f"sentencepiece:{tmp_path}/m.model").cuttable


def test_truncation_and_padding_of_a_tokenizer_json_are_off(made, tmp_path):
    """Such settings are for a classifier's batches: of a corpus they leave 5 tokens a document."""
    plain = made["gpt2"].encode(CORPUS)
    np.testing.assert_array_equal(made["hf"].encode(CORPUS), plain)
    found = made["hf"].encode_batch(["a", CORPUS])
    assert [len(ids) for ids in found] == [1, len(plain)]
    save_tokenizer(made["hf"], tmp_path)
    assert len(load_tokenizer(tmp_path).encode(CORPUS)) == len(plain)


PIECES = ["<unk>", "</s>", "<", "/", "s", ">", "a", "b", "\u2581", "/s", "s>", "</"]
UNIGRAM = models.Unigram([(p, -1.0 * (i > 1)) for i, p in enumerate(PIECES)], unk_id=0)
WORDS = models.WordLevel({p: i for i, p in enumerate(PIECES)}, unk_token="<unk>")


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("model", "added"), [(UNIGRAM, True), (UNIGRAM, False), (WORDS, False)])
@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.sampled_from(["</s>", "<", "/s>", "a", "b", " ", "<unk>", "\uff1c/s>"])))
def test_plain_text_never_turns_into_a_special_token(model, added, normalised, words):
    """Though the model holds the special token as a piece like any other, as Unigram files do."""
    fast, text = FastTokenizer(model), "".join(words)
    if normalised:
        fast.normalizer = normalizers.NFKC()  # makes a `<` of U+FF1C, after we have looked
    if model is WORDS:
        fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if added:
        fast.add_special_tokens(["</s>", "<unk>"])
    tokenizer = HfTokenizer(fast.to_str(), 1, "x")
    ids = tokenizer.encode(text)
    assert 1 not in ids
    if model is UNIGRAM and not normalised and not set(text) - set("</s>ab"):
        assert tokenizer.decode(ids).replace(" ", "") == text, "and the text is all there"


def test_special_tokens_have_ids_of_their_own(made, tmp_path):
    plain = made["sentencepiece"]
    path = tmp_path / "m.model"
    path.write_bytes(plain.model)
    tokenizer = make_tokenizer(f"sentencepiece:{path}", special_tokens="<|user|>,<|end|>")
    assert tokenizer.vocab_size == plain.vocab_size + 2
    assert max(tokenizer.encode("<|user|> says <|end|>")) < plain.vocab_size
    own = {"<|user|>": plain.vocab_size, "<|end|>": plain.vocab_size + 1}
    assert tokenizer.special == {"<|endoftext|>": plain.end_of_text} | own
    marked = [plain.vocab_size, *plain.encode("hello"), plain.vocab_size + 1]
    assert tokenizer.decode(marked) == "<|user|>hello<|end|>"
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.special == tokenizer.special and again.decode(marked) == tokenizer.decode(marked)
    with pytest.raises(BadInput, match="give different names"):
        make_tokenizer("byte", special_tokens="<a>,<a>")


def test_a_special_token_is_found_under_any_of_its_names(made):
    fast = FastTokenizer(models.WordLevel({"a": 0, "</s>": 1, "<mask>": 2, "<unk>": 3}, "<unk>"))
    fast.add_special_tokens(["</s>", "<mask>", "<unk>"])
    theirs = HfTokenizer(fast.to_str(), 1, "x")
    assert special_id(theirs, "filling", "[MASK]", "<mask>") == 2
    assert special_id(SpecialTokens(theirs, ["[MASK]"]), "filling", "[MASK]", "<mask>") == 4
    assert special_id(SpecialTokens(theirs, ["<b>"]), "filling", "[MASK]", "<mask>") == 2
    with pytest.raises(BadInput, match=r"filling needs the special token \[MASK\].*_tokens="):
        special_id(made["gpt2"], "filling", "[MASK]", "<mask>")


def test_the_sample_to_train_on_is_bounded_and_fair(monkeypatch):
    from jaxgpt.tokenizer import sentencepiece as module

    monkeypatch.setattr(module, "SAMPLE_BYTES", 10_000)

    def corpus(letter):
        return TrainingText(lambda: (f"{letter * 50}\n" * 100 for _ in range(100)), 510_000, 0.5)

    lines = list(module._sample_lines([corpus("a"), corpus("b")]))
    assert lines == list(module._sample_lines([corpus("a"), corpus("b")])), "the same each time"
    of_a = sum(line[0] == "a" for line in lines)
    assert 60 < of_a < 140 and 60 < len(lines) - of_a < 140, "about 98 lines of 51 bytes each"
