"""Rows on disk: what ends a line, what is cut away, what is no row."""

import json

import pytest

from jaxgpt.metrics.rows import METRICS, SAMPLES, RowFile, read_rows
from jaxgpt.system.errors import BadInput

ENDS = "a\u2028b\u2029c\u0085d\x1ce\x0bf\r\ng\nh"  # what str.splitlines cuts at


def row(step: int, split="train") -> dict:
    return {"step": step, "split": split, "loss": 1.5, "seconds": 0.5}


def test_a_text_with_unicode_line_ends_is_one_row(tmp_path):
    file = tmp_path / "samples.jsonl"
    for step in (1, 2, 3):
        rows = RowFile(file, step - 1, SAMPLES)
        rows.write({"step": step, "prompt": "", "text": ENDS})
        rows.close()
    assert [r["step"] for r in read_rows(file, SAMPLES)] == [1, 2, 3]
    assert all(r["text"] == ENDS for r in read_rows(file, SAMPLES))
    RowFile(file, 2, SAMPLES).close()
    assert [r["step"] for r in read_rows(file, SAMPLES)] == [1, 2]


BETWEEN = {
    "blank": b"\n",
    "NUL": b"\0" * 40 + b"\n",
    "NUL before a row": b"\0\0" + json.dumps(row(2)).encode() + b"\n",
    "torn": b'{"step": 2, "split": "tr\n',
    "two in one": json.dumps(row(2)).encode() * 2 + b"\n",
    "not UTF-8": b'{"step": 2, "split": "\xff"}\n',
    "no object": b"[2]\n",
    "no step": b'{"split": "train", "loss": 1, "seconds": 1}\n',
    "a step of another kind": json.dumps(row(2) | {"step": "2"}).encode() + b"\n",
    "a loss of another kind": json.dumps(row(2) | {"loss": []}).encode() + b"\n",
    "deep": b"[" * 5000 + b"\n",
    "a long integer": b'{"step": ' + b"9" * 5000 + b"}\n",
    "half a surrogate": b'{"step": 2, "split": "\\ud800", "loss": 1, "seconds": 1}\n',
}


@pytest.mark.parametrize("line", BETWEEN.values(), ids=BETWEEN)
def test_a_line_that_is_no_row_is_named_and_kept_aside(tmp_path, capsys, line):
    file = tmp_path / "metrics.jsonl"
    good = [json.dumps(row(step)).encode() + b"\n" for step in (1, 3, 4)]
    file.write_bytes(before := good[0] + line + good[1] + good[2] + b'{"step": 5, "spl')
    assert [r["step"] for r in read_rows(file, METRICS)] == [1, 3, 4]
    assert f"damaged   line 2 of {file}: " in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    rows = RowFile(file, 3, METRICS)
    rows.write(row(4) | {"loss": 2.5})
    rows.close()
    assert "line 2" in (said := capsys.readouterr().err) and "metrics.jsonl.damaged" in said
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    assert file.read_bytes() == good[0] + good[1] + json.dumps(row(4) | {"loss": 2.5}).encode() + (
        b"\n"
    )


def test_half_a_last_line_is_cut_away_without_a_word(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2)))
    RowFile(file, 9, METRICS).close()
    assert file.read_text() == json.dumps(row(1)) + "\n"
    assert capsys.readouterr().err == "" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
@pytest.mark.parametrize("then", ["write", "sync", "close"])
def test_a_file_that_goes_away_is_noticed(tmp_path, how, then):
    folder = tmp_path / "w"
    folder.mkdir()
    rows = RowFile(folder / "metrics.jsonl", 0, METRICS)
    rows.write(row(1))
    if how == "deleted":
        (folder / "metrics.jsonl").unlink()
        folder.rmdir()
    else:
        folder.rename(tmp_path / "away")
    if how == "replaced":
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("")
    with pytest.raises(BadInput, match="was moved or deleted while the run was writing to it"):
        rows.write(row(2)) if then == "write" else getattr(rows, then)()
