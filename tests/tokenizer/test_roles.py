"""Special tokens are found by what they serve as, in BERT's, RoBERTa's, BART's and T5's files."""

import json

import pytest
import sentencepiece

from jaxgpt.interchange.tokenizers import read_tokenizer
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.base import ByteTokenizer
from jaxgpt.tokenizer.hf import HfTokenizer
from jaxgpt.tokenizer.load import add_special_tokens
from jaxgpt.tokenizer.roles import framed, role_id, sentinels
from jaxgpt.tokenizer.special import SpecialTokens
from tests.tokenizer.vocabularies import BERT_WORDS, CONFIG, tokenizer_folder

FAMILIES = ["bert", "roberta", "t5", "bart"]
ROLES = {  # mask, cls, sep, pad, eos, what a decoder starts with
    "bert": (5, 3, 4, 0, 4, 4),
    "roberta": (263, 0, 2, 1, 2, 2),
    "t5": (None, None, 1, 0, 1, 0),
    "bart": (263, 0, 2, 1, 2, 2),
}
TEXTS = [
    "The king's  gambit, 東京 naïve\n\tfoo [MASK] the, <mask> bar.",
    *("[MASK]x", "a [SEP] <s>b</s>", "", " ", "½ ﬁx", "Hello <extra_id_0> the <extra_id_1>."),
    "a  <extra_id_99>b\0\ufffd\u2028 \U0001f600 \ue000" + "the " * 30,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tokenizer_folder(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_a_model_folder(folders, family, tmp_path):
    tokenizer = read_tokenizer(folders[family])
    save_tokenizer(tokenizer, tmp_path / "w")
    more = add_special_tokens(tokenizer, ["<|new|>", "<|fim_prefix|>"])
    for found in (tokenizer, load_tokenizer(tmp_path / "w"), more):
        roles = tuple(map(found.role, ("mask", "cls", "sep", "pad", "eos", "decoder_start")))
        assert roles == ROLES[family], found
    assert tokenizer.role("forced_bos") == (0 if family == "bart" else None)
    assert more.role("fim_prefix") == tokenizer.vocab_size + 1
    with pytest.raises(BadInput, match=r"filling needs the special token <\|fim_suffix\|>.*='<"):
        role_id(more, "filling", "fim_suffix")
    assert role_id(more, "padding", "pad") == ROLES[family][3]


def test_names_in_a_text(folders):
    letters = {word: i for i, word in enumerate(BERT_WORDS)}
    bert = read_tokenizer(folders["bert"])
    assert bert.encode("The sing[MASK]").tolist() == [
        *(letters[w] for w in ("the", "s", "##ing")),
        *(letters[w] for w in ("[UNK]", "m", "##a", "##s", "##k", "[UNK]")),
    ]
    found = bert.encode_with_special("Thé [MASK] a").tolist()
    assert found == [letters["the"], 5, letters["a"]]
    assert bert.decode(bert.encode("The   THE,a")) == "the the, a", "BERT does not round-trip"
    roberta = read_tokenizer(folders["roberta"])
    found = roberta.encode_with_special("the <mask> the").tolist()  # it takes the space before it
    assert found == [*roberta.encode("the"), 263, *roberta.encode(" the")]
    assert roberta.decode(roberta.encode(TEXTS[0])) == TEXTS[0]
    t5 = read_tokenizer(folders["t5"])
    assert len(sentinels(t5)) == 100 and sentinels(t5)[:2] == [399, 398] and t5.vocab_size == 400
    found = t5.encode_with_special("the <extra_id_0> the").tolist()
    assert found == [*t5.encode("the"), 399, *t5.encode("the")]
    assert 399 not in t5.encode("<extra_id_0>")
    ours = SpecialTokens(ByteTokenizer(), ["[MASK]", "[MASK]s"])
    assert ours.encode_with_special("a[MASK]b[MASK]s").tolist() == [97, 257, 98, 258]
    assert ByteTokenizer().encode_with_special("[MASK]").tolist() == [*b"[MASK]"]


def test_a_piece_may_be_a_line_separator(tmp_path):
    """Only a newline ends a line of vocab.txt: ids behind the piece stay those of the model."""
    words = [*BERT_WORDS, "\u2028", "behind"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG["bert"]))
    bert = read_tokenizer(tmp_path)
    assert bert.vocab_size == len(words)
    assert bert.encode("behind").tolist() == [len(words) - 1]


def test_t5_cuts_as_sentencepiece_does(folders):
    t5 = read_tokenizer(folders["t5"])
    model = (folders["t5"] / "spiece.model").read_bytes()
    theirs = sentencepiece.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(model)
    for text in ("The  Licence ½ ﬁx", " grant of\n\tpatent   licence ", "", "naïve 東京"):
        assert t5.encode(text).tolist() == theirs.encode(text), text


def test_frames(folders):
    a, b = [40, 41], [42]
    expected = {
        "bert": ([3, 40, 41, 4, 42, 4], [0, 0, 0, 0, 1, 1]),
        "roberta": ([0, 40, 41, 2, 2, 42, 2], [0] * 7),
        "t5": ([40, 41, 1, 42, 1], [0] * 5),
        "bart": ([0, 40, 41, 2, 2, 42, 2], [0] * 7),
    }
    for family, (ids, types) in expected.items():
        tokenizer = read_tokenizer(folders[family])
        assert framed(tokenizer, a, b) == (ids, types)
        end = ids.index(b[0])
        one = ids[: end - 1] if family in ("roberta", "bart") else ids[:end]
        assert framed(tokenizer, a) == framed(add_special_tokens(tokenizer, ["x"]), a)
        assert framed(tokenizer, a) == (one, [0] * len(one))
    byte = ByteTokenizer()
    assert framed(byte, a, b) == ([40, 41, 256, 42, 256], [0, 0, 0, 1, 1])
    marked = add_special_tokens(byte, ["[SEP]", "[CLS]"])
    assert framed(marked, a) == ([258, 40, 41, 257], [0] * 4)


def test_what_a_tokenizer_has_is_not_added_again(folders):
    bert = make_tokenizer(f"hf:{folders['bert']}", (), "[MASK],[CLS]")
    assert isinstance(bert, HfTokenizer) and bert.role("mask") == 5
    both = make_tokenizer(f"hf:{folders['bert']}", (), "[MASK],new")
    assert both.special["new"] == bert.vocab_size == both.vocab_size - 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("vocab.txt", "[PAD]\n[UNK]\na", r"lacks \[CLS\], \[SEP\], \[MASK\]"),
        ("spiece.model", "no model", "is not a vocabulary"),
        ("vocab.json", json.dumps({"<mask>": 0}), "lacks <s>, <pad>, </s>, <unk>"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
    ],
)
def test_damaged_vocabularies(tmp_path, file, text, message):
    if file == "tokenizer_config.json":
        tokenizer_folder(tmp_path, "bert")
    (tmp_path / file).write_text(text)
    with pytest.raises(BadInput, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("saved", [False, True])
def test_ids_and_texts_are_transformers_s(folders, family, saved, tmp_path):
    """Also of the files that transformers itself saves."""
    import transformers

    name = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer"}
    name |= {"t5": "T5Tokenizer", "bart": "BartTokenizer"}
    theirs, folder = getattr(transformers, name[family]).from_pretrained(folders[family]), None
    if saved:
        folder = tmp_path / "saved"
        theirs.save_pretrained(folder)
        (folder / "config.json").write_text((folders[family] / "config.json").read_text())
    ours = read_tokenizer(folder or folders[family])
    assert len(theirs) == ours.vocab_size
    assert theirs.mask_token_id == ours.role("mask") and theirs.pad_token_id == ours.role("pad")
    for text in TEXTS:
        if "<mask>" not in text:  # RoBERTa's takes the space before it since fairseq
            ids = ours.encode_with_special(text).tolist()
            assert framed(ours, ids)[0] == theirs(text)["input_ids"], text
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not set(plain) & set(theirs.all_special_ids):  # ours never makes one of plain text
            assert ours.encode(text).tolist() == plain, text
        shown = theirs.decode(plain, clean_up_tokenization_spaces=False)
        if family != "bert":
            assert ours.decode(ours.encode(text)) == shown or "<" in text, text
    first, second = ours.encode("the a"), ours.encode("b")
    both = theirs("the a", "b", return_token_type_ids=True)
    assert framed(ours, first, second) == (both["input_ids"], both["token_type_ids"])
