"""Rows from files to arrays on disk and back, and what is wrong with a row in one line."""

import json

import numpy as np
import pytest

from jaxgpt.config import Config, DataConfig, ModelConfig
from jaxgpt.labelled.companions import OnRows, check_labels
from jaxgpt.labelled.labels import (
    balanced_weights,
    format_labels,
    ids_of,
    in_order,
    parse_labels,
    parse_weights,
)
from jaxgpt.labelled.prepare import prepare_rows, prepare_whole_rows
from jaxgpt.labelled.rows import open_rows
from jaxgpt.system.errors import BadInput
from tests.data.damage import DAMAGE

ROWS = [{"text": f"row {i} é", "label": ["no", "yes"][i % 2]} for i in range(10)]


def config_of(source, objective="classification", fields=None, model=None, **data) -> Config:
    """A run on rows; `fields` are the objective's."""
    config = Config(
        objective=objective,
        model=ModelConfig(max_seq_len=24),
        data=DataConfig(source=source, **data),
    )
    for name, value in (model or {}).items():
        setattr(config.model, name, value)
    for name, value in (fields or {}).items():
        setattr(getattr(config.objectives, objective), name, value)
    return config


def write(tmp_path, rows, name="a.jsonl") -> str:
    """Writes rows of JSON; returns the source."""
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    return f"jsonl:{tmp_path / name}"


def texts(split, tokenizer, name="text") -> list[str]:
    return [tokenizer.decode(split.arrays[name][i]) for i in range(split.rows)]


def test_rows_come_back_from_the_disk(tmp_path):
    data = prepare_rows(config_of(write(tmp_path, ROWS), validation_fraction=0.2))
    assert texts(data.train, data.tokenizer) == [row["text"] for row in ROWS[:8]]
    assert texts(data.validation, data.tokenizer) == [row["text"] for row in ROWS[8:]]
    names = [data.train.labels[int(data.train.arrays["label"][i][0])] for i in range(8)]
    assert names == [row["label"] for row in ROWS[:8]]
    assert data.train.where(2) == f"{tmp_path}/a.jsonl, row 3"
    assert data.counts == {"documents": 10, "tokens": 80, "bytes": 80}
    assert prepare_rows(config_of(write(tmp_path, ROWS), validation_fraction=0.2)).folder == (
        data.folder
    )


def test_what_is_chosen_when_reading_needs_no_other_folder(tmp_path):
    source = write(tmp_path, ROWS)
    plain = prepare_rows(config_of(source))
    chosen = {"labels": "yes,no", "pooling": "mean", "class_weights": "1,2"}
    assert prepare_rows(config_of(source, fields=chosen)).folder == plain.folder
    other = [{"other": row["text"], "label": row["label"]} for row in ROWS]
    moved = config_of(write(tmp_path, other), fields={"text_field": "other"})
    assert prepare_rows(moved).folder != plain.folder


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("file", ["train.text.values", "validation.label.ends", "meta.json"])
def test_a_damaged_folder_is_made_anew(tmp_path, capsys, file, damage):
    config = config_of(write(tmp_path, ROWS))
    before = prepare_rows(config)
    DAMAGE[damage](before.folder / file)
    after = prepare_rows(config)
    assert after.fingerprint == before.fingerprint
    assert "it is made anew" in capsys.readouterr().err
    DAMAGE[damage](before.folder / file)
    with pytest.raises(BadInput, match=str(before.folder)):
        prepare_rows(config_of(f"shards:{before.folder}"))


def test_every_kind_of_file_holds_the_same_rows(tmp_path):
    rows = [{"text": 'a "b", c', "label": "x"}, {"text": "line", "label": "y"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.csv").write_text('text,label\n"a ""b"", c",x\nline,y\n')
    (tmp_path / "a.tsv").write_text('text\tlabel\na "b", c\tx\n\nline\ty\n')
    sources = [write(tmp_path, rows), f"jsonl:{tmp_path}/a.json"]
    sources += [f"csv:{tmp_path}/a.csv", f"tsv:{tmp_path}/a.tsv"]
    for source in sources:
        (opened,) = open_rows(source, DataConfig(), tmp_path)
        assert [row.fields for row in opened.documents()] == rows, source


def test_a_mixture_has_a_part_for_each_source_and_a_validation_source_its_own_rows(tmp_path):
    one, two = write(tmp_path, ROWS, "a.jsonl"), write(tmp_path, ROWS[:4], "b.jsonl")
    config = config_of(f"0.75*{one},0.25*{two}", validation_source=write(tmp_path, ROWS[:3], "c"))
    data = OnRows.prepare(config)
    assert [(part.first, part.end) for part in data.train.parts] == [(0, 10), (10, 14)]
    assert data.validation.rows == 3
    stream = OnRows.stream(OnRows.completed(config, data), data)
    source, _ = stream.chunks(np.arange(8))
    assert np.bincount(source).tolist() == [6, 2]


def test_a_tokenizer_is_trained_on_the_texts_of_the_training_part(tmp_path):
    data = prepare_rows(config_of(write(tmp_path, ROWS), tokenizer="char"))
    known = data.tokenizer.characters
    assert set("row 012345678é") == set(known)  # row 9 is held out, and labels are no text


def test_all_rows_of_a_source_for_evaluation(tmp_path):
    config = config_of(write(tmp_path, ROWS))
    tokenizer = prepare_rows(config).tokenizer
    split = prepare_whole_rows(write(tmp_path, ROWS[5:], "b.jsonl"), config, tokenizer)
    assert texts(split, tokenizer) == [row["text"] for row in ROWS[5:]]


def test_labels_are_sorted_listed_and_balanced(tmp_path):
    assert in_order(["b", "10", "9", "a", "-1"]) == ["-1", "9", "10", "a", "b"]
    for names in (["a", "b"], ["a, b", "c"], ["[x", "y"]):
        assert parse_labels(format_labels(names), "f") == names
    assert ids_of(["x", "z"], ["z", "x"]).tolist() == [1, 0]
    assert ids_of(["1", "0", "2"], ["negative", "positive"]).tolist() == [1, 0, -1]
    assert ids_of(["1", "cat"], ["cat", "dog"]).tolist() == [-1, 0]
    weights = parse_weights(balanced_weights(np.array([1, 3, 0])), 3, "f")
    np.testing.assert_allclose(weights, [2, 2 / 3, 1], rtol=1e-5)  # 1 * 2 + 3 * 2/3 = 4 examples


def test_labels_come_from_the_training_part_and_stay_when_resumed(tmp_path):
    rows = [{"text": "a", "label": i % 3 == 0} for i in range(10)]
    config = config_of(write(tmp_path, rows), fields={"class_weights": "balanced"})
    done = OnRows.completed(config, prepare_rows(config))
    cfg = done.objectives.classification
    assert (cfg.labels, cfg.class_weights) == ("false,true", "balanced 0.75,1.5")
    assert config.objectives.classification.labels == ""
    assert OnRows.adopted(config, done).objectives == done.objectives


BAD_ROWS = [
    ("classification", {"text": "a"}, "row 2|line 2.*has no field 'label'.*label_field"),
    ("classification", {"text": 3, "label": "a"}, "line 2: field 'text' is no text, but 3"),
    (
        "classification",
        {"text": "a", "label": 0.5},
        "line 2: label 'label' must be text or a whole",
    ),
    ("classification", {"text": "a", "label": " "}, "must be text or a whole number"),
    ("classification", {"text": "\ud800", "label": "a"}, "half a surrogate pair"),
    ("classification", ["text"], "line 2 is no object with fields"),
    ("seq2seq", {"source": "a"}, "has no field 'target'.*objectives.seq2seq.target_field"),
    ("token_classification", {"words": ["a"], "labels": ["A", "B"]}, "1 words and 2 labels"),
    ("token_classification", {"words": [""], "labels": ["A"]}, "none empty"),
    ("token_classification", {"words": 3, "labels": ["A"]}, "no list, but 3"),
    ("span_qa", {"question": "q", "context": "abc", "answers": "x"}, "'x' is nowhere of"),
    (
        "span_qa",
        {"question": "q", "context": "abc", "answers": {"text": ["b"], "answer_start": [0]}},
        "'b' is not at character 0",
    ),
    ("span_qa", {"question": "q", "context": "abc", "answers": [{"text": 1}]}, "is no answer"),
]
GOOD = {
    "classification": {"text": "a", "label": "b"},
    "seq2seq": {"source": "a", "target": "b"},
    "token_classification": {"words": ["a"], "labels": ["b"]},
    "span_qa": {"question": "q", "context": "abc", "answers": []},
}


@pytest.mark.parametrize("objective, row, message", BAD_ROWS)
def test_a_bad_row_is_one_line_with_its_place(tmp_path, objective, row, message):
    config = config_of(write(tmp_path, [GOOD[objective], row]), objective)
    config.model.kind = "encoder_decoder" if objective == "seq2seq" else "encoder"
    with pytest.raises(BadInput, match=message) as e:
        prepare_rows(config)
    assert "a.jsonl, line 2" in str(e.value)
    assert not list((tmp_path / "cache").glob("*/meta.json"))


def test_a_bad_table_is_one_line(tmp_path):
    for text, message in (
        ("text,label\na,b,c\n", "row 1 has 3 fields, not 2"),
        ("text,text\na,b\n", "its first line must name the fields"),
        ('text,label\n"a,b\n', "row 1 has 1 fields"),
    ):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(BadInput, match=message):
            prepare_rows(config_of(f"csv:{tmp_path}/a.csv"))
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff,a\n")
    with pytest.raises(BadInput, match="cannot be read after .*utf-8"):
        prepare_rows(config_of(f"csv:{tmp_path}/a.csv"))


@pytest.mark.parametrize(
    "source, fields, message",
    [
        ("builtin", {}, "'builtin' has no rows with fields"),
        ("text:a", {}, "'text:a' has no rows with fields.*jsonl:GLOB"),
        ("jsonl:a.jsonl", {"labels": "a,a"}, "labels='a,a' must list two or more different"),
        ("jsonl:a.jsonl", {"pooling": "first"}, "pooling=first on a decoder"),
    ],
)
def test_what_cannot_be_learnt_is_said_before_a_row_is_read(source, fields, message):
    with pytest.raises(BadInput, match=message):
        OnRows.check(config_of(source, fields=fields))


def test_no_rows_one_row_one_label_and_unknown_labels(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="is empty: it holds no row"):
        prepare_rows(config_of(f"jsonl:{tmp_path}/empty.jsonl"))
    with pytest.raises(BadInput, match="has one row"):
        prepare_rows(config_of(write(tmp_path, ROWS[:1])))
    same = config_of(write(tmp_path, [{"text": "a", "label": "b"}] * 4))
    with pytest.raises(BadInput, match="all training rows have the label 'b'"):
        OnRows.completed(same, prepare_rows(same))
    rows = [*ROWS, {"text": "a", "label": "maybe"}]
    unknown = config_of(write(tmp_path, rows))
    with pytest.raises(BadInput, match="a.jsonl, row 11: label 'maybe' is unknown; .* no, yes"):
        OnRows.completed(unknown, prepare_rows(unknown))
    split = prepare_rows(unknown).validation
    check_labels(split, ["no", "yes", "maybe"], "f", "label")
    weights = config_of(write(tmp_path, ROWS), fields={"class_weights": "1,2,3"})
    with pytest.raises(BadInput, match="class_weights='1,2,3' must be 2 numbers"):
        OnRows.completed(weights, prepare_rows(weights))
