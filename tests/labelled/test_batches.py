"""Rows as a model reads them: framed, cut, padded, aligned with their labels and answers."""

import numpy as np
import pytest

from jaxgpt.config.schema import IGNORE
from jaxgpt.labelled.companions import OnRows
from jaxgpt.labelled.examples import cut_longest
from jaxgpt.labelled.prepare import prepare_rows, task_of
from jaxgpt.labelled.span_qa import best_span
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer.base import ByteTokenizer
from jaxgpt.tokenizer.special import SpecialTokens
from tests.labelled.test_rows import ROWS, config_of, write

END, CLS, SEP = 256, 257, 258
BERT = {"special_tokens": "[CLS],[SEP]"}
ENCODER = {"kind": "encoder", "type_vocab_size": 2}


def batch_of(config, k=0):
    """Batch k with one microbatch, [B, ...], and the data."""
    config.data.shuffle = False
    data = prepare_rows(config)
    config = OnRows.completed(config, data)
    return {n: a[0] for n, a in OnRows.stream(config, data).batch(k).items()}, data, config


def shown(ids) -> str:
    names = {END: "|", CLS: "<", SEP: ">", 0: "."}
    return "".join(names.get(int(i)) or chr(i) for i in ids)


def test_a_text_is_framed_and_padded(tmp_path):
    rows = [{"text": "abc", "label": "x"}, {"text": "d" * 30, "label": "y"}]
    config = config_of(write(tmp_path, rows * 2), model={"max_seq_len": 8})
    config.batch_size = 2
    batch, _, done = batch_of(config)
    assert [shown(row) for row in batch["inputs"]] == ["abc|....", "ddddddd|"]
    assert batch["segments"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 0, 0, 0], [*range(8)]]
    assert batch["labels"].tolist() == [0, 1]
    arrays = task_of(done).batch_arrays()
    assert {n: (a.shape[1:], a.dtype) for n, a in batch.items()} == arrays


def test_a_pair_is_cut_at_the_longer_text_and_has_types(tmp_path, capsys):
    rows = [{"text": "abcdefgh", "pair": "xy", "label": str(i % 2)} for i in range(4)]
    config = config_of(
        write(tmp_path, rows),
        fields={"pair_field": "pair"},
        model=ENCODER | {"max_seq_len": 9},
        **BERT,
    )
    batch, _, _ = batch_of(config)
    assert shown(batch["inputs"][0]) == "<abcd>xy>"
    assert batch["types"][0].tolist() == [0] * 6 + [1] * 3
    assert "cut       3 of 3 texts of train lose their end" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["classification", "span_qa"])
def test_a_pair_needs_two_types(tmp_path, objective):
    fields = {"pair_field": "pair"} if objective == "classification" else {}
    model = {"kind": "encoder", "type_vocab_size": 1}
    config = config_of("jsonl:none", objective, fields, model)
    tokenizer = SpecialTokens(ByteTokenizer(), ("[CLS]", "[SEP]"))
    with pytest.raises(BadInput, match="model.type_vocab_size=1: .* set 2, or 0 for none"):
        OnRows.check_tokenizer(config, tokenizer)
    config.model.type_vocab_size = 2
    OnRows.check_tokenizer(config, tokenizer)
    one = config_of("jsonl:none", "classification", {}, model)
    OnRows.check_tokenizer(one, tokenizer)  # types of a single text are 0


def test_the_longer_of_two_texts_is_cut_first():
    def sizes(a, b, room):
        return [len(part) for part in cut_longest([np.zeros(a), np.zeros(b)], room)]

    for a in range(7):
        for b in range(7):
            for room in range(2, 13):
                kept = sizes(a, b, room)
                assert sum(kept) == min(a + b, room)
                if a + b > room:  # the shorter one is whole, or both are about equal
                    assert (
                        kept[0] == a <= kept[1] + 1
                        or kept[1] == b <= kept[0] + 1
                        or (abs(kept[0] - kept[1]) <= 1)
                    )


def test_each_words_first_token_has_its_label(tmp_path):
    rows = [{"words": ["New", "York", "is"], "labels": ["B", "I", "O"]}] * 4
    source = write(tmp_path, rows)
    config = config_of(source, "token_classification", model=ENCODER | {"max_seq_len": 12}, **BERT)
    batch, data, done = batch_of(config)
    assert shown(batch["inputs"][0]) == "<New York i>"
    assert done.objectives.token_classification.labels == "B,I,O"
    ignored = [IGNORE] * 3
    assert batch["targets"][0].tolist() == [-1, 0, *ignored[:2], 1, *ignored, -1, 2, -1, -1]
    stream = OnRows.stream(done, data)
    assert stream.num_targets(0) == 3 * done.batch_size


def test_a_decoder_learns_what_its_encoder_reads(tmp_path):
    rows = [{"source": "abc", "target": "xyz"}, {"source": "a" * 20, "target": "b" * 20}] * 2
    model = {"max_seq_len": 6, "max_source_len": 8, "kind": "encoder_decoder"}
    config = config_of(write(tmp_path, rows), "seq2seq", {"prompt": "to: "}, model)
    config.batch_size = 2
    batch, data, done = batch_of(config)
    assert [shown(row) for row in batch["sources"]] == ["to: abc|", "to: aaa|"]
    assert [shown(row) for row in batch["inputs"]] == ["|xyz..", "|bbbbb"]
    assert shown(batch["targets"][0][:4]) == "xyz|" and batch["targets"][0][4:].tolist() == [-1, -1]
    assert shown(batch["targets"][1]) == "bbbbbb"  # cut: what would follow is not the end
    assert OnRows.stream(done, data).num_targets(0) == (batch["targets"] != IGNORE).sum() == 10
    assert task_of(done, data.tokenizer).cut(data.train) == {"sources": 1, "targets": 1}
    arrays = task_of(done).batch_arrays()
    assert {n: (a.shape[1:], a.dtype) for n, a in batch.items()} == arrays


def test_bytes_of_a_target_are_those_that_are_predicted(tmp_path):
    """Else bits per byte would be too low wherever targets are cut."""
    rows = [{"source": "a", "target": text} for text in ("éz", "b" * 20, "ccé")] * 2
    model = {"max_seq_len": 4, "max_source_len": 8, "kind": "encoder_decoder"}
    _, data, done = batch_of(config_of(write(tmp_path, rows), "seq2seq", {}, model))
    task = task_of(done, data.tokenizer)
    found = [task.target_bytes(data.train, np.array([row])) for row in range(3)]
    assert found == [3, 4, 4]  # of "ccé" only the end is cut off
    assert task.target_bytes(data.train, np.arange(3)) == 11


def test_classes_of_an_encoder_decoder_are_read_by_both(tmp_path):
    model = {"max_seq_len": 12, "kind": "encoder_decoder"}
    batch, _, done = batch_of(config_of(write(tmp_path, ROWS), model=model))
    assert (
        shown(batch["sources"][0]) == "row 0 Ã©|..." and shown(batch["inputs"][0]) == "|row 0 Ã©..."
    )
    assert task_of(done).pooling == "last" and task_of(done).batch_arrays().keys() == batch.keys()


def squad(context, question="Who?", **answer):
    return {"question": question, "context": context, "answers": answer or {"text": []}}


def answers(texts, starts):
    return {"text": texts, "answer_start": starts}


def test_an_answer_is_found_in_the_window_that_holds_it(tmp_path):
    long = "abcdefghijklmnopqrst"
    rows = [
        squad("é an éclair", **answers(["éclair"], [5])),
        squad(long, **answers(["qr"], [16])),
        squad("nothing"),
    ]
    config = config_of(
        write(tmp_path, [*rows, rows[0]]), "span_qa", model=ENCODER | {"max_seq_len": 23}, **BERT
    )
    batch, data, done = batch_of(config)
    task, split = task_of(done, data.tokenizer), data.train
    chunks = OnRows.stream(done, data).sources[0]
    assert list(zip(chunks.rows, chunks.starts)) == [(0, 0), (1, 0), (1, 8), (2, 0)]
    read = chunks.read(np.arange(len(chunks)))
    assert [shown(row) for row in read["inputs"][1:3]] == [
        "<Who?>abcdefghijklmnop>",
        "<Who?>ijklmnopqrst>....",
    ]
    assert read["spans"][[1, 3]].tolist() == [[0, 0], [0, 0]]  # it is not there whole
    first, last = read["spans"][2]
    assert shown(read["inputs"][2][first : last + 1]) == "qr"
    assert read["context"][2].tolist() == [1] + [0] * 5 + [1] * 12 + [0] * 5
    for chunk in (0, 2):  # back from the tokens to the text
        row, start = int(chunks.rows[chunk]), int(chunks.starts[chunk])
        span = tuple(read["spans"][chunk].tolist())
        assert [task.answer(split, row, start, span)] == task.references(split, row)
    assert task.answer(split, 0, 0, (0, 0)) == "" and task.references(split, 2) == []


def test_windows_of_every_row_are_those_of_a_plain_loop(tmp_path):
    """Each starts half a window behind the one before, until one reaches the context's end."""
    rows = [squad("c" * size, "q" * asked) for size in range(0, 48, 3) for asked in (0, 3, 4, 40)]
    for length in (9, 10, 13):
        model = ENCODER | {"max_seq_len": length}
        config = config_of(write(tmp_path, rows), "span_qa", model=model, **BERT)
        _, data, done = batch_of(config)
        chunks = OnRows.stream(done, data).sources[0]
        windows = []
        for row in range(data.train.rows):
            question, context = (len(data.train.arrays[n][row]) for n in ("question", "context"))
            room = length - 3 - min(question, length // 2)  # [CLS] and two [SEP]
            start = 0
            windows.append((row, start))
            while start + room < context:
                start += max(room // 2, 1)
                windows.append((row, start))
        assert list(zip(chunks.rows, chunks.starts)) == windows
        read = chunks.read(np.arange(len(chunks)))
        seen = np.zeros((data.train.rows, 48), bool)
        for (row, start), allowed in zip(windows, read["context"]):
            seen[row, start : start + allowed[1:].sum()] = True
        contexts = data.train.arrays["context"].lengths
        assert (seen.sum(1) == contexts).all()  # no token is in no window


def test_the_best_span_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, end = rng.normal(size=(2, 9))
        start[rng.integers(9)] = -np.inf
        pairs = [(start[i] + end[j], (i, j)) for i in range(9) for j in range(i, 9)]
        assert best_span(start, end) == max(pairs)


def test_offsets_are_those_of_the_tokens_texts():
    text = "aé\u20acb"
    for tokenizer in (ByteTokenizer(), SpecialTokens(ByteTokenizer(), ["[CLS]"])):
        spans = tokenizer.offsets(text, tokenizer.encode(text))
        assert spans.tolist() == [[0, 1], [1, 2], [1, 2], [2, 3], [2, 3], [2, 3], [3, 4]]
    assert ByteTokenizer().offsets("", np.zeros(0, np.int32)).shape == (0, 2)
    with pytest.raises(BadInput, match="does not say where its tokens are"):
        ByteTokenizer().offsets("other", ByteTokenizer().encode("text"))


def test_batches_are_a_function_of_seed_and_number(tmp_path):
    config = config_of(write(tmp_path, ROWS), validation_fraction=0.2)
    config.batch_size, config.grad_accum = 4, 2
    data = prepare_rows(config)
    done = OnRows.completed(config, data)
    stream = OnRows.stream(done, data)
    epoch = [stream.batch(k) for k in (0, 1)]
    assert epoch[0]["labels"].shape == (2, 2) and epoch[0]["inputs"].shape == (2, 2, 24)
    seen = {shown(row) for batch in epoch for row in batch["inputs"].reshape(-1, 24)}
    assert len(seen) == 8  # each row once
    again = OnRows.stream(done, prepare_rows(config)).batch(1)
    assert all(np.array_equal(again[n], epoch[1][n]) for n in again)
    assert any(not np.array_equal(stream.batch(2)[n], epoch[0][n]) for n in again)
