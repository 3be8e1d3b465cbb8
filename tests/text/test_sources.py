"""Documents out of files, archives, tables and datasets."""

import glob
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from jaxgpt.config import DataConfig
from jaxgpt.data.split import measure
from jaxgpt.system.errors import BadInput
from jaxgpt.text import files, formats, pieces
from jaxgpt.text.sources import nearest, open_sources
from jaxgpt.tokenizer.base import ByteTokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def opened(source, field="text", data_dir="", tokenizer=None):
    cfg = DataConfig(field=field, data_dir=data_dir)
    return open_sources(source, cfg, Path("cache"), tokenizer)


def documents(source, field="text", data_dir=""):
    (one,) = opened(source, field, data_dir)
    return [piece.text for piece in one.documents()]


def test_text_is_a_document_per_file_in_name_order(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"zwei\r\n")
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
    first = documents("builtin")
    assert first == documents("builtin")
    assert any("def " in text for text in first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": ', r"x.jsonl, line 2 is not valid JSON"),
        (b'{"text": "a"}\n{"body": "b"}', r"line 2 has no text field 'text' \(its fields are body"),
        (b'{"text": 3}', "line 1 has no text field"),
        (b"7", "line 1 has no text field 'text' .not an object"),
        (b"[1]", "row 1 has no text field 'text' .not an object"),
        (b'{"text": "\xff"}', "line 1 is not UTF-8"),
        (b'{"text": "\\ud800"}', r"line 1 holds half a surrogate pair \(U\+D800\)"),
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
        ("0*builtin,1*builtin", "weights must be above 0"),
        ("bin:x", "set data.tokenizer to the one that made them"),
        (f"text:{tmp_path}/latin.txt", r"latin.txt is not UTF-8 \(byte 0: 0xe9\)"),
        (f"text:{tmp_path}/cut.gz", "cannot be read"),
        (f"text:{tmp_path}/empty.txt", "is empty"),
    ):
        with pytest.raises(BadInput, match=message):
            measure(opened(source)[0].documents, source)


@pytest.mark.parametrize(
    "spec, meant",
    [
        ("posts.txt", "text:posts.txt"),
        ("books", "text:books"),  # a folder that is there
        ("no-books", ""),
        ("a/b", "text:a/b"),
        ("~/posts.jsonl.gz", "jsonl:~/posts.jsonl.gz"),
        ("a/*.parquet", "parquet:a/*.parquet"),
        ("crawl.warc.gz", "warc:crawl.warc.gz"),
        ("train.bin", "bin:train.bin"),
        ("gs://bucket/*.ndjson.zst", "jsonl:gs://bucket/*.ndjson.zst"),
        ("json:posts.jsonl", "jsonl:posts.jsonl"),
        ("ftp:x", ""),
        ("text:posts.jsonl", "jsonl:posts.jsonl"),
        ("text:posts.json", "jsonl:posts.json"),
        ("text:chats.json", "sft:chats.json"),
        ("chats.json", "sft:chats.json"),
        ("jsonl:chats.json", ""),
        ("text:gs://bucket/a.jsonl", "jsonl:gs://bucket/a.jsonl"),
        ("text:posts.txt", ""),
        ("text:a.md", ""),
        ("jsonl:posts.txt", ""),
        ("sft:posts.jsonl", ""),
        ("builtin", ""),
        ("x" * 5000, ""),
    ],
)
def test_the_source_that_was_meant(spec, meant, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "chats.json").write_text('[{"instruction": "a", "output": "b"}]')
    assert nearest(spec) == meant
    if meant and not spec.startswith("text:"):
        with pytest.raises(BadInput, match=f"is unknown; did you mean {re.escape(meant)}?"):
            opened(spec)
    else:
        assert not nearest(meant)


def test_a_character_across_two_blocks_and_the_place_of_a_bad_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 7)
    (tmp_path / "a.txt").write_text("ünïcödé " * 20)
    assert documents("text:a.txt") == ["ünïcödé " * 20]
    (tmp_path / "a.txt").write_bytes("ünïcödé ".encode() * 20 + b"\xc3")
    with pytest.raises(BadInput, match=r"not UTF-8 \(byte 240: 0xc3\)"):
        documents("text:a.txt")


def test_long_documents_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_CHARS", 50)
    monkeypatch.setattr(formats, "BLOCK", 64)
    text = "".join(f"line {i} of some text\n" for i in range(50))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short")
    (tmp_path / "c.txt").write_text("x" * 2000)
    (one,) = opened("text:*.txt")
    found = list(one.documents())
    assert sum(not piece.continues for piece in found) == 3
    assert max(len(p.text) for p in found if "x" not in p.text[-3:]) <= 50 + 64
    assert [piece.text for piece in pieces.join_pieces(found)] == [text, "short", "x" * 2000]


def test_folders_globs_and_zstd(tmp_path):
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "d/e/b.jsonl.zst").write_bytes(
        zstandard.compress(b'{"text": "two"}\n{"text": "3"}')
    )
    (tmp_path / "d/a.jsonl").write_text('{"text": "one"}')
    assert documents("jsonl:d") == ["one", "two", "3"]
    assert documents("jsonl:d/**/*.zst") == ["two", "3"]
    (tmp_path / "d/e/b.jsonl.zst").write_bytes(zstandard.compress(b"x" * 9999)[:-9])
    with pytest.raises(BadInput, match="b.jsonl.zst"):
        documents("jsonl:d")


def test_links_are_followed_once(tmp_path):
    """A folder that links lead back into is read once, by a folder's name and by `**`."""
    inner = tmp_path / "d/e"
    inner.mkdir(parents=True)
    (tmp_path / "d/a.txt").write_text("one")
    (inner / "b.txt").write_text("two")
    (inner / ".hidden.txt").write_text("not shown")
    (tmp_path / "d/.git").mkdir()
    (tmp_path / "d/.git/c.txt").write_text("not shown")
    for i in range(20):  # each loop doubles the paths
        (inner / f"up{i}").symlink_to("..", target_is_directory=True)
    (inner / "same.txt").symlink_to("b.txt")
    (inner / "self.txt").symlink_to("self.txt")
    (inner / "gone.txt").symlink_to("nowhere")
    for source in ("text:d", "text:d/**/*.txt", "text:./d/**", f"text:{tmp_path}/d/**/*.txt"):
        assert documents(source) == ["one", "two"], source
    assert documents("text:**/e/**/*.txt") == ["two"]
    assert documents("text:d/*/*.txt") == ["two"]
    assert documents("text:d/**/.hidden.txt") == ["not shown"]
    (tmp_path / "elsewhere").symlink_to("d/e")
    assert documents("text:elsewhere") == ["two", "one"], "a link to a folder is followed"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["a", "b", ".h", "a/b", "a/.h/c", "b/a/a", "a/a/b/c.t"]), unique=True),
    st.lists(st.sampled_from(["**", "*", "a", "?", "[ab]", ".*", "c.t"]), min_size=1, max_size=4),
)
def test_patterns_mean_what_glob_says(names, pattern):
    """Without links, the files are those of the standard library's `glob`."""
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            (Path(root) / name).mkdir(parents=True, exist_ok=True)
            (Path(root) / name / "f").touch()
        pattern = "/".join([root, *pattern])
        expected = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
        if os.path.isdir(pattern):
            return  # a folder's name means all below it
        try:
            assert files.list_files("x", pattern) == sorted(set(expected))
        except BadInput:
            assert not expected


def test_parquet(tmp_path):
    table = pyarrow.table({"body": ["eins", None, "", "zwei"], "n": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert documents("parquet:t.parquet", "body") == ["eins", "zwei"]
    with pytest.raises(BadInput, match="has no column 'text': it has body, n; set data.field"):
        documents("parquet:t.parquet")
    with pytest.raises(BadInput, match="'n' .* holds int64, not text"):
        documents("parquet:t.parquet", "n")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(BadInput, match="cannot be read as parquet"):
        documents("parquet:t.parquet", "body")


def web_archive(file, pages):
    with open(file, "wb") as out:
        writer = WARCWriter(out, gzip=str(file).endswith("gz"))
        for kind, status, content_type, body in pages:
            headers = StatusAndHeaders(
                status, [("Content-Type", content_type)], protocol="HTTP/1.1"
            )
            headers = headers if kind == "response" else None
            payload = io.BytesIO(body)
            writer.write_record(
                writer.create_warc_record("http://x/", kind, payload=payload, http_headers=headers)
            )


def test_web_archives(tmp_path):
    latin = "<html><body><p>caf\xe9</p></body></html>"
    web_archive(
        tmp_path / "a.warc.gz",
        [
            ("response", "200 OK", "text/html; charset=iso-8859-1", latin.encode("latin-1")),
            ("response", "200 OK", "text/html", b"<meta charset='latin-1'>\xe9"),
            ("response", "404 Not Found", "text/html", b"gone"),
            ("response", "200 OK", "image/png", b"\x89PNG"),
            ("request", "", "", b"GET /"),
        ],
    )
    web_archive(tmp_path / "b.warc.wet", [("conversion", "", "", "zwei é".encode())])
    assert documents("warc:a.warc.gz") == [latin, "<meta charset='latin-1'>é"]
    assert documents("warc:b.warc.wet") == ["zwei é"]
    (tmp_path / "c.warc").write_text("no archive at all\n" * 9)
    with pytest.raises(BadInput, match="c.warc"):
        documents("warc:c.warc")


def test_remote_files():
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/a.txt", b"eins")
    fs.pipe("/bucket/sub/b.txt.gz", gzip.compress(b"zwei"))
    assert documents("text:memory://bucket/*.txt") == ["eins"]
    assert documents("text:memory://bucket") == ["eins", "zwei"]
    with pytest.raises(BadInput, match="no file matches memory://none"):
        opened("text:memory://none/*")
    with pytest.raises(BadInput, match="cannot be listed.*[Pp]rotocol"):
        opened("text:nosuchscheme://a/*")


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A real TFDS dataset in ArrayRecord files."""
    import tensorflow_datasets as tfds

    class SmallNews(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "body": tfds.features.Text(),
                "label": np.int64,
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._rows(5), "test": self._rows(2)}

        def _generate_examples(self):
            raise NotImplementedError

        def _rows(self, count):
            for i in range(count):
                yield i, {"text": f"é news {i}/{count}", "body": f"body {i}", "label": i}

    folder = str(tmp_path_factory.mktemp("tfds"))
    SmallNews(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds(tfds_folder):
    (source,) = opened("tfds:small_news", "text", tfds_folder)
    assert sorted(p.text for p in source.documents()) == [f"é news {i}/5" for i in range(5)]
    assert sorted(p.text for p in source.validation.documents()) == ["é news 0/2", "é news 1/2"]
    assert source.identity() != source.validation.identity()
    assert sorted(documents("tfds:small_news:1.0.0", "body", tfds_folder))[0] == "body 0"
    for name, field, message in (
        ("small_news", "label", "has no text feature 'label': set data.field to one of text, body"),
        ("no_such_thing", "text", "is not in .* and TFDS knows no such dataset; set data.data_dir"),
        ("ag_news_subset", "text", "tfds:ag_news_subset is not in .*tfds build ag_news_subset"),
    ):
        with pytest.raises(BadInput, match=message) as e:
            opened(f"tfds:{name}", field, tfds_folder)
        assert "\n" not in str(e.value)


def test_tfds_needs_no_tensorflow(tfds_folder):
    code = (
        "import sys; from pathlib import Path; from jaxgpt.text.sources import open_sources;"
        "from jaxgpt.config import DataConfig;"
        f"(s,) = open_sources('tfds:small_news', DataConfig(data_dir={tfds_folder!r}),"
        " Path('c'));"
        "print(len(list(s.documents())), 'tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["5", "False"]


def test_token_files(tmp_path):
    tokens = np.array([256, 65, 66, 256, 67, 256], "<u2")
    tokens.tofile(tmp_path / "a.bin")  # end-of-text in front and behind
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 2
    (tmp_path / "b.bin").write_bytes(header.tobytes() + np.array([68, 69], "<u2").tobytes())
    (source,) = opened("bin:*.bin", tokenizer=ByteTokenizer())
    assert [p.tokens.tolist() for p in source.documents()] == [[65, 66], [67], [68, 69]]
    header[2] = 3
    (tmp_path / "b.bin").write_bytes(header.tobytes() + np.array([68, 69], "<u2").tobytes())
    with pytest.raises(BadInput, match="its header says 3 tokens"):
        list(source.documents())
    (tmp_path / "b.bin").write_bytes(np.array([257], "<u2").tobytes())
    with pytest.raises(BadInput, match="holds token 257, beyond the tokenizer's 257"):
        list(source.documents())
    (tmp_path / "b.bin").write_bytes(b"odd")
    with pytest.raises(BadInput, match="not a file of uint16 tokens"):
        list(source.documents())


def test_mixtures():
    found = opened("0.7*builtin, .2*builtin,1.1*builtin")
    assert [s.weight for s in found] == [Fraction(7, 20), Fraction(1, 10), Fraction(11, 20)]


def test_hashes_of_large_files_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REMEMBERED", 4)
    monkeypatch.setattr(files, "RACY_SECONDS", 0)
    file, memory = tmp_path / "a.txt", tmp_path / "memory.json"
    file.write_text("hello")
    os.utime(file, (1, 1))
    first = files.hash_files([str(file)], memory)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open_file", lambda *a, **k: pytest.fail("should be remembered"))
        assert files.hash_files([str(file)], memory) == first
    time.sleep(0.05)  # time stamps move on every few milliseconds
    file.write_text("jello")
    os.utime(file, (1, 1))
    assert files.hash_files([str(file)], memory) != first, "of the same size and modification time"
    monkeypatch.setattr(files, "RACY_SECONDS", 60)
    young = tmp_path / "b.txt"
    young.write_text("hello")
    files.hash_files([str(young)], memory)
    assert str(young) not in memory.read_text(), "it may still change within its time stamp"


@pytest.mark.parametrize(
    "damaged",
    ["", "[]", "{", '{"FILE": 1}', '{"FILE": [[5, 1], "zz"]}', '{"FILE": [[5], 3]}', "\0", "NaN"],
)
def test_a_damaged_memory_of_hashes_is_begun_anew(tmp_path, monkeypatch, capsys, damaged):
    monkeypatch.setattr(files, "REMEMBERED", 4)
    monkeypatch.setattr(files, "RACY_SECONDS", 0)
    file, memory = tmp_path / "a.txt", tmp_path / "memory.json"
    file.write_text("hello")
    first = files.hash_files([str(file)], tmp_path / "other.json")
    memory.write_text(damaged.replace("FILE", str(file)))
    assert files.hash_files([str(file)], memory) == first
    assert "memory.json is damaged" in capsys.readouterr().err
    assert files.hash_files([str(file)], memory) == first and not capsys.readouterr().err


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    Path("x.parquet").touch()
    with pytest.raises(BadInput, match=r"needs pyarrow .*pip install -e '.\[data\]'"):
        documents("parquet:x.parquet")
