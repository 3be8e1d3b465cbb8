"""Files that hold one JSON array of rows, as alpaca and ShareGPT are published."""

import gzip
import json
import tracemalloc

import pytest

from jaxgpt.config import DataConfig
from jaxgpt.data.prepare import prepare
from jaxgpt.system.errors import BadInput
from jaxgpt.text import formats

ROWS = [
    {"instruction": "Say é, 東京 or 🙂", "input": "", "output": 'a "quoted" \\ line\n' * 9},
    {"instruction": "Count", "input": "to", "output": "three", "more": [1, [2.5e-3, {"a": None}]]},
]
ODD = [-12345678901, 1.5e300, "", [], {}, True, None, "🙂 \u2028", float("inf"), "[,]"]


def values(file) -> list:
    return [value for _, _, value in formats.json_rows([str(file)])]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("style", [{}, {"indent": 3}, {"ensure_ascii": False}])
def test_rows_are_those_of_json(tmp_path, monkeypatch, block, style):
    """However the file is cut into blocks."""
    monkeypatch.setattr(formats, "BLOCK", block)
    rows, file = [*ROWS, *ODD, *ROWS], tmp_path / "rows.json"
    file.write_text("\n\t " + json.dumps(rows, **style) + "\n ")
    assert values(file) == rows == json.loads(file.read_text())
    file.write_text(" [ ] ")
    assert values(file) == []


@pytest.mark.parametrize(
    "content, message",
    [
        (b'[{"a": 1}, {"a" 2}]', "row 2 is not valid JSON: Expecting ':'"),
        (b'[{"a": 1} {"a": 2}]', "row 1 is followed by neither a comma nor the end"),
        (b'[{"a": 1}, {"a": 2}', "row 2 is followed by neither a comma nor the end"),
        (b'[{"a": 1}, {"a": "b', "row 2 is not valid JSON: Unterminated string"),
        (b'[{"a": 1},', "row 2 is not valid JSON: Expecting value"),
        (b"[1,]", "row 2 is not valid JSON: Expecting value"),
        (b"[1] 2", "goes on after the end of its array of 1 rows"),
        (b'[{"a": "\xe9"}]', r"not UTF-8 \(byte 8: 0xe9\)"),
        (b"[" * 100_000, "row 1 is not valid JSON: maximum recursion"),
        (b"[" + b"1" * 5000 + b"]", "row 1 is not valid JSON: Exceeds the limit"),
        (b'[{"a": "\x01"}, "' + b"x" * 999, "row 1 is not valid JSON: Invalid control character"),
        (b'{\n  "a": 1\n}', "line 1 is not valid JSON: .* one object a line, or one array"),
    ],
)
def test_a_damaged_array_is_named_with_its_row(tmp_path, content, message, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 64)
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BadInput, match=f"x.json,? .*{message}"):
        values(tmp_path / "x.json")


def test_one_row_is_in_memory_and_none_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 1 << 10)
    with gzip.open(tmp_path / "rows.json.gz", "wt") as file:
        json.dump([{"text": f"{i} " * 999} for i in range(999)], file)
    tracemalloc.start()
    count = sum(1 for _ in formats.json_rows([f"{tmp_path}/rows.json.gz"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 999 and peak < 300_000  # of 4 MB
    monkeypatch.setattr(formats, "LONGEST", 5000)
    (tmp_path / "long.json").write_text(json.dumps(["a", "b" * 9000]))
    with pytest.raises(BadInput, match="long.json, row 2 is longer than 5,000 characters"):
        values(tmp_path / "long.json")


def test_sft_reads_an_array_like_lines_and_names_the_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    one, two = (
        prepare(DataConfig(source=f"sft:{tmp_path}/{name}", validation_fraction=0.3))
        for name in ("a.json", "b.jsonl")
    )
    assert one.fingerprint == two.fingerprint and one.train.num_targets > 0
    for rows, message in (
        ([*ROWS, {"prompt": "a", "response": "b"}], "a.json, row 3 has prompt .*, but row 1 has"),
        ([ROWS[0], {"instruction": "a"}], "a.json, row 2 has neither messages"),
        ([ROWS[0], ROWS[1] | {"output": ""}], "a.json, row 2 has no response to learn"),
        ([ROWS[0], 7], r"a.json, row 2 has neither .* \(not an object\)"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(rows))
        with pytest.raises(BadInput, match=message):
            prepare(DataConfig(source=f"sft:{tmp_path}/a.json"))
