"""Documents out of files, and which of them are held out."""

import gzip
import json
import itertools

import pytest

from jaxgpt.config import BadInput
from jaxgpt.data.sources import open_source
from jaxgpt.data.split import hold_out, scan


def documents(source, field="text"):
    return list(open_source(source, field)())


def test_text_is_a_document_per_file_in_name_order(tmp_path):
    (tmp_path / "b.txt").write_bytes("zwei\r\n".encode())
    (tmp_path / "a.txt").write_bytes("eins é\n".encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"drei"))
    (tmp_path / "d.txt").write_bytes(b"")
    assert documents(f"text:{tmp_path}/*") == ["eins é\n", "zwei\r\n", "drei"]


def test_jsonl(tmp_path):
    rows = [{"text": "one", "body": "eins"}, {"text": "two\n", "body": "zwei"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert documents(f"jsonl:{tmp_path}/a.jsonl") == ["one", "two\n"]
    assert documents(f"jsonl:{tmp_path}/a.jsonl", "body") == ["eins", "zwei"]


def test_builtin_is_python_and_the_same_each_time():
    first = list(itertools.islice(open_source("builtin")(), 40))
    assert first == list(itertools.islice(open_source("builtin")(), 40))
    assert any("def " in text for text in first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": ', r"x.jsonl, line 2 is not valid JSON"),
        (b'{"text": "a"}\n{"body": "b"}', r"line 2 has no text field 'text' \(its fields are body"),
        (b'{"text": 3}', "line 1 has no text field"),
        (b"[1]", "line 1 has no text field 'text' .not an object"),
        (b'{"text": "\xff"}', "line 1 is not UTF-8"),
        (b'{"text": "\\ud800"}', "unpaired surrogate"),
    ],
)
def test_broken_jsonl(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        documents(f"jsonl:{tmp_path}/x.jsonl")


def test_bad_text_sources(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"hello" * 100)[:-12])
    (tmp_path / "empty.txt").touch()
    for source, message in (
        ("web:x", "data source 'web:x' is unknown"),
        ("text:", "is unknown"),
        (f"text:{tmp_path}/none*", "no file matches"),
        (f"text:{tmp_path}/latin.txt", r"latin.txt is not UTF-8 \(byte 0: 0xe9\)"),
        (f"text:{tmp_path}/cut.gz", "cannot be read"),
        (f"text:{tmp_path}/empty.txt", "is empty"),
    ):
        with pytest.raises(BadInput, match=message):
            scan(open_source(source), source)


def split(texts, fraction):
    sizes = tuple(len(t.encode()) for t in texts)
    train, validation = hold_out(lambda: iter(texts), sizes, fraction)
    return list(train()), list(validation())


def test_whole_documents_are_held_out_from_the_end():
    texts = [f"{i:03}" for i in range(10)]
    assert split(texts, 0.1) == (texts[:9], texts[9:])
    assert split(texts, 0.34) == (texts[:7], texts[7:])
    assert split(texts, 0.001) == (texts[:9], texts[9:]), "at least one"
    assert split(texts, 0.999) == (texts[:1], texts[1:]), "not all"
    assert split(["x" * 90, "y" * 5, "z" * 5], 0.05) == (["x" * 90, "y" * 5], ["z" * 5])


def test_a_single_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(10))
    train, validation = split([text], 0.25)
    assert "".join(train + validation) == text
    assert validation == ["line 8\nline 9\n"], "the first line within the last quarter"
    assert split(["a\n" + "b" * 98], 0.5) == (["a\n"], ["b" * 98]), "else the last line"
    assert split(["x" * 100], 0.1) == (["x" * 90], ["x" * 10]), "else the character"


def test_the_digest_sees_document_borders():
    digests = {scan(lambda t=t: iter(t), "s").digest for t in (["ab", "c"], ["a", "bc"], ["abc"])}
    assert len(digests) == 3
