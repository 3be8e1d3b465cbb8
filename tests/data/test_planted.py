"""Faults of data preparation that went unnoticed when they were planted."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import DataConfig
from jaxgpt.config.schema import IGNORE
from jaxgpt.data.prepare import prepare, prepare_whole
from jaxgpt.data.shards import SplitWriter, token_dtype
from jaxgpt.evaluation.windows import evaluation_batch, evaluation_windows
from jaxgpt.text import formats, pieces
from jaxgpt.text.cleaning import Report, clean_documents, make_steps
from jaxgpt.text.pieces import Piece
from jaxgpt.tokenizer import make_tokenizer

BASE = {"source": "jsonl:{}/a.jsonl", "field": "text", "validation_fraction": 0.3}
CHATML = {"source": "sft:{}/sft.jsonl", "special_tokens": "<|im_start|>,<|im_end|>"}
CHANGES = [  # (fields, a change of theirs that changes the tokens)
    (BASE, {"source": "jsonl:{}/b.jsonl"}),
    (BASE, {"source": "text:{}/a.jsonl"}),
    (BASE, {"field": "other"}),
    (BASE, {"validation_fraction": 0.6}),
    (BASE, {"validation_source": "text:{}/v.txt"}),
    (BASE | {"validation_source": "text:{}/v.txt"}, {"validation_source": "text:{}/w.txt"}),
    (BASE, {"clean": "unicode"}),
    (BASE | {"clean": "unicode,exact_dedup"}, {"clean": "exact_dedup,unicode"}),
    (BASE, {"clean": "near_dedup:0.9"}),
    (BASE, {"tokenizer": "char"}),
    (BASE, {"special_tokens": "<a>"}),
    (BASE | {"tokenizer": "char", "special_tokens": "<a>"}, {"special_tokens": "<b>"}),
    (CHATML, {"chat_template": "chatml"}),
    (
        BASE | {"source": "1*text:{}/v.txt,1*text:{}/w.txt"},
        {"source": "1*text:{}/w.txt,1*text:{}/v.txt"},
    ),
    (
        BASE | {"source": "1*text:{}/v.txt,1*text:{}/w.txt"},
        {"source": "2*text:{}/v.txt,1*text:{}/w.txt"},
    ),
    ({"source": "task:sentiment:{}/t.jsonl"}, {"source": "task:entailment:{}/t.jsonl"}),
]
SAME = [{"shuffle": False}, {"pack": True}]


@pytest.fixture
def made(tmp_path):
    """Prepares a config whose `{}` is a folder of small files; returns (folder, Prepared)."""
    rows = [{"text": f"text {i} e\u0301", "other": f"other {i}"} for i in range(9)]
    row = {"text": "a", "premise": "b", "hypothesis": "c", "label": 1}
    for name, content in {
        "a.jsonl": "\n".join(map(json.dumps, rows)),
        "b.jsonl": "\n".join(map(json.dumps, rows[:-1])),
        "sft.jsonl": '{"prompt": "a", "response": "b"}\n' * 4,
        "t.jsonl": f"{json.dumps(row)}\n" * 4,
        "v.txt": "held out\nby hand\n",
        "w.txt": "held out\nby foot\n",
    }.items():
        (tmp_path / name).write_text(content)

    def call(fields):
        filled = {
            k: v.replace("{}", str(tmp_path)) if isinstance(v, str) else v
            for k, v in fields.items()
        }
        return prepare(DataConfig(**filled))

    return call


@pytest.mark.parametrize(("fields", "change"), CHANGES, ids=lambda d: ",".join(d) or "-")
def test_the_cache_tells_apart_what_differs(made, fields, change):
    """A key that forgets a field would give the tokens of before."""
    assert made(fields).folder != made(fields | change).folder


@pytest.mark.parametrize("change", SAME, ids=lambda d: ",".join(d))
def test_the_cache_knows_what_makes_no_difference(made, change):
    assert made(BASE).folder == made(BASE | change).folder


def test_sizes_are_bytes_of_utf8_not_characters(tmp_path):
    texts = ["日本語のテキスト", "é" * 50, "\U0001f600"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    cfg = DataConfig(source=f"jsonl:{tmp_path}/a.jsonl", validation_fraction=0.01, tokenizer="char")
    data = prepare(cfg)
    assert data.train.bytes == sum(len(t.encode()) for t in texts[:2])
    assert data.validation.bytes == len(texts[2].encode())


@pytest.mark.parametrize(
    ("size", "dtype"), [(257, "<u2"), (1 << 16, "<u2"), ((1 << 16) + 1, "<u4")]
)
def test_the_largest_id_fits_its_type(tmp_path, size, dtype):
    assert token_dtype(size) == np.dtype(dtype)
    writer = SplitWriter(tmp_path, "train", token_dtype(size), {}, False)
    writer.begin_part("s", Fraction(1))
    writer.begin_document("f", 0, size - 1)
    writer.extend(np.array([0, size - 1]), 1)
    writer.close()
    assert np.fromfile(tmp_path / "train.bin", dtype).tolist() == [size - 1, 0, size - 1]


def test_one_document_of_tokens_is_cut_once(tmp_path, monkeypatch):
    """Of a single document the last part is held out, wherever its pieces end; nothing twice.

    It was cut where its last piece begins: of three million tokens a third was held out.
    """
    monkeypatch.setattr(formats, "TOKENS_AT_ONCE", 64)
    tokens = np.arange(1000) % 256
    tokens.astype("<u2").tofile(tmp_path / "a.bin")
    data = prepare(DataConfig(source=f"bin:{tmp_path}/a.bin", validation_fraction=0.13))
    assert (data.train.documents, data.validation.documents) == (1, 1)
    found = [*data.train.tokens[1:], *data.validation.tokens[1:]]
    np.testing.assert_array_equal(found, tokens)
    assert len(data.validation.tokens) == 131


def test_one_line_in_pieces_is_cut_at_the_character(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_CHARS", 50)
    monkeypatch.setattr(formats, "BLOCK", 64)
    (tmp_path / "a.txt").write_text("word " * 200)
    data = prepare(DataConfig(source=f"text:{tmp_path}/a.txt", validation_fraction=0.13))
    assert (len(data.train.tokens) - 1, len(data.validation.tokens) - 1) == (870, 130)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 120), st.integers(2, 12), st.integers(1, 12), st.integers(1, 4))
def test_with_a_stride_every_target_counts_once_with_all_that_is_before(length, seq, stride, batch):
    stride = min(stride, seq)
    tokens = np.arange(length, dtype=np.uint16)
    count = evaluation_windows(length, seq, stride)
    batches = [
        evaluation_batch(tokens, seq, batch, k, stride=stride) for k in range(-(-count // batch))
    ]
    counted = np.concatenate([b["targets"][b["targets"] != IGNORE] for b in batches])
    np.testing.assert_array_equal(counted, tokens[1:])
    for b in batches:
        real = b["targets"] != IGNORE
        np.testing.assert_array_equal(b["targets"][real], b["inputs"][real] + 1)
        places = np.broadcast_to(np.arange(seq), real.shape)[real]
        assert all((places >= seq - stride) | (b["targets"][real] <= seq)), "context is used"


def test_a_thousand_different_documents_are_no_duplicates():
    documents = [Piece(f"document {i}") for i in range(1000)]
    report = Report()
    assert (
        len(list(clean_documents(documents, make_steps("exact_dedup"), report))) == 1000
        and not report.dropped
    )


@pytest.mark.parametrize(("changed", "kept"), [(0, 1), (12, 1), (20, 2), (40, 2), (200, 2)])
def test_the_similarity_from_which_on_documents_are_near(changed, kept):
    """400 words, of which some are replaced, one in ten so that each costs five 5-grams."""
    words = [f"w{i}" for i in range(400)]
    other = (
        [f"x{i}" if i % (400 // changed) == 0 else w for i, w in enumerate(words)]
        if changed
        else words
    )
    documents = [Piece(" ".join(words)), Piece(" ".join(other))]
    grams = [{tuple(t[i : i + 5]) for i in range(396)} for t in (words, other)]
    similarity = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    assert (similarity >= 0.7) == (kept == 1) and abs(similarity - 0.7) > 0.03, similarity
    assert len(list(clean_documents(documents, make_steps("near_dedup"), Report()))) == kept


def test_what_ends_a_learnt_document_is_learnt_and_what_ends_another_is_not(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]},
        {"messages": [{"role": "assistant", "content": "d"}, {"role": "user", "content": "ef"}]},
        {"prompt": "g", "response": "h"},
        {"prompt": "i", "response": "j"},
    ]
    for number in (0, 2):  # a file holds rows of one kind
        text = "\n".join(map(json.dumps, rows[number : number + 2]))
        (tmp_path / f"s{number}.jsonl").write_text(text)
    split = prepare_whole(
        f"sft:{tmp_path}/s*.jsonl", DataConfig(), make_tokenizer("byte"), tmp_path
    )
    ends = [bool(split.mask[start]) for start in split.starts]
    assert ends == [False, True, False, True], "the first, and what follows bc, ef and h"
    assert split.num_targets == int(np.count_nonzero(split.mask))


def test_the_origin_of_a_token_is_its_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n{"text": "two"}\n{"text": "three"}\n')
    split = prepare_whole(
        f"jsonl:{tmp_path}/a.jsonl", DataConfig(), make_tokenizer("byte"), tmp_path
    )
    places = [(0, 2), (3, 2), (4, 4), (7, 4), (8, 5), (13, 5)]
    assert [split.origin(t)[1] for t, _ in places] == [
        f"{tmp_path}/a.jsonl:{row}" for _, row in places
    ]


def test_the_fingerprint_tells_masks_apart(tmp_path):
    """The same tokens, of which other ones are learnt, are another corpus."""
    rows = [{"prompt": "ab", "response": "cd"}, {"prompt": "a", "response": "bcd"}]
    found = []
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
        found.append(prepare(DataConfig(source=f"sft:{tmp_path}/{number}.jsonl")))
    assert bytes(found[0].train.tokens) == bytes(found[1].train.tokens)
    assert found[0].fingerprint != found[1].fingerprint
