"""Text sources, cleaning and mixtures as nobody should write them.

`prepare` reads each, or refuses it in one line and leaves nothing behind.
"""

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from jaxgpt import prepare
from tests.hostile.conftest import Case, name_of

CONFIG = "from jaxgpt.config import *\ndef get_config():\n    return Config()\n"
GOOD = b"a line of text\nand another\n"
DEEP = b"[" * 100_000
DIGITS = b"9" * 5000


def of(name: str, source: str, files: dict, says: str = "", code: int = 2, **data) -> Case:
    """A case of `prepare` with `data.source` and further fields of `data`."""
    more = [f"--config.data.{field}={value}" for field, value in data.items()]
    argv = ["--config={}/c.py", f"--config.data.source={source}", *more]
    return Case(name, argv, {"c.py": CONFIG} | files, says, (code,))


# Lines that no reader of JSON rows takes, whatever its fields.
NO_ROWS = {
    "not JSON": (b"text", "is not valid JSON"),
    "cut": (b'{"text": "a', "is not valid JSON"),
    "deep": (DEEP, "is not valid JSON"),
    "deep objects": (b'{"a":' * 100_000, "is not valid JSON"),
    "5,000 digits": (b'{"text": ' + DIGITS + b"}", "is not valid JSON"),
    "5,000 digits beside": (b'{"text": "a", "n": ' + DIGITS + b"}", "is not valid JSON"),
    "Latin-1": (b'{"text": "caf\xe9"}', "is not UTF-8 (byte 13: 0xe9)"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "is not UTF-8"),
    "NUL": (b"\0", "is not valid JSON"),
    "a list": (b"[1]", ""),
    "a number": (b"3", ""),
    "a string": (b'"text"', ""),
    "null": (b"null", ""),
    "an empty object": (b"{}", ""),
    "two rows in a line": (b'{"text": "a"} {"text": "b"}', "is not valid JSON"),
    "a byte-order mark": (b'\xef\xbb\xbf{"text": "a"}', "is not valid JSON"),
    "single quotes": (b"{'text': 'a'}", "is not valid JSON"),
    "only blanks": (b" \n\t\n", "is empty"),
    "empty": (b"", "is empty"),
}
TEXTS = {  # what a field of text may hold instead
    "null": (b"null", ""),
    "a number": (b"1.5", ""),
    "true": (b"true", ""),
    "a list": (b'["a"]', ""),
    "an object": (b'{"a": "b"}', ""),
    "half a pair": (b'"\\ud800"', "half a surrogate pair (U+D800)"),
    "the other half": (b'"a\\udfff b"', "half a surrogate pair (U+DFFF)"),
    "halves in the wrong order": (b'"\\udc00\\ud800"', "half a surrogate pair"),
    "a raw control character": (b'"a\x01b"', "is not valid JSON"),
    "an encoded surrogate": (b'"\xed\xa0\x80"', "is not UTF-8"),
}
ROWS = {  # one good row of each kind, with a place for each field of text
    "jsonl": [b'{"text": %s}'],
    "sft": [
        b'{"prompt": %s, "response": "b"}',
        b'{"prompt": "a", "response": %s}',
        b'{"messages": [{"role": "user", "content": %s}, {"role": "assistant", "content": "b"}]}',
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": %s}]}',
        b'{"messages": [{"role": %s, "content": "a"}]}',
        b'{"conversations": [{"from": "gpt", "value": %s}]}',
        b'{"instruction": %s, "output": "b"}',
        b'{"instruction": "a", "output": %s}',
    ],
    "task:sentiment": [b'{"text": %s, "label": 0}', b'{"text": "a", "label": %s}'],
    "task:entailment": [
        b'{"premise": %s, "hypothesis": "a", "label": 0}',
        b'{"premise": "a", "hypothesis": %s, "label": 0}',
    ],
    "task:questions": [
        b'{"context": %s, "question": "a", "answers": "b"}',
        b'{"context": "a", "question": %s, "answers": "b"}',
        b'{"context": "a", "question": "b", "answers": %s}',
        b'{"context": "a", "question": "b", "answers": [%s]}',
        b'{"context": "a", "question": "b", "answers": {"text": [%s]}}',
    ],
}
JSON_CASES = [
    *(
        of(f"{kind}: {name}", f"{kind}:x.jsonl", {"x.jsonl": line}, says)
        for kind in ROWS
        for name, (line, says) in NO_ROWS.items()
    ),
    *(
        of(
            f"{kind} {number}: {name}",
            f"{kind}:x.jsonl",
            {"x.jsonl": row % value},
            "" if b'%s, "content' in row else says,  # a role is one of three
        )
        for kind, rows in ROWS.items()
        for number, row in enumerate(rows)
        for name, (value, says) in TEXTS.items()
        if (kind, number, name) != ("task:questions", 2, "a list")  # answers may be one
    ),
    of("label 2 of 2", "task:sentiment:x", {"x": b'{"text": "a", "label": 2}'}, "label 2 is"),
    of("label -1", "task:sentiment:x", {"x": b'{"text": "a", "label": -1}'}, "label -1 is"),
    of("no answer", "task:questions:x", {"x": b'{"context":"","question":"","answers":[]}'}),
    of("no message", "sft:x", {"x": b'{"messages": []}'}, "no response to learn"),
    of("messages no list", "sft:x", {"x": b'{"messages": {}}'}, "must be a list"),
    of("the second row", "jsonl:x", {"x": b'{"text": "a"}\n\n{}'}, "x, line 3 has no text field"),
    of("a field of no name", "jsonl:x", {"x": b'{"text": "a"}'}, "no text field ''", field=""),
    of("a long field", "jsonl:x", {"x": b'{"text": "a"}'}, "no text field", field="x" * 9999),
]
SEPARATORS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"
READ = [  # strange, but text
    of(
        "separators", "jsonl:x", {"x": json.dumps({"text": SEPARATORS}, ensure_ascii=False)}, code=0
    ),
    of("NUL in a text", "jsonl:x", {"x": b'{"text": "a\\u0000b"}'}, code=0),
    of("a pair", "jsonl:x", {"x": b'{"text": "\\ud83d\\ude00 b"}'}, code=0),
    of("doubled field", "jsonl:x", {"x": b'{"text": 3, "text": "ab"}'}, code=0),
    of("NaN beside", "jsonl:x", {"x": b'{"text": "ab", "n": NaN}'}, code=0),
    of("\\r\\n lines", "jsonl:x", {"x": b'{"text": "a"}\r\n{"text": "b"}\r\n'}, code=0),
    of("separators as text", "text:x", {"x": SEPARATORS}, code=0),
    of("a byte-order mark", "text:x", {"x": "\ufefftext"}, code=0),
    of("one long line", "text:x", {"x": b"x" * 3_000_000}, code=0),
    of("only NUL", "text:x", {"x": bytes(3_000_000)}, code=0),
    of("two gzip members", "text:x.gz", {"x.gz": gzip.compress(GOOD) * 2}, code=0),
    of("two zstd frames", "text:x.zst", {"x.zst": zstandard.compress(GOOD) * 2}, code=0),
    of("odd weights", f".{'3' * 30}*text:x,1*text:x", {"x": GOOD}, code=0),
    of("a composed accent", "text:é*", {"é.txt": GOOD}, code=0),
    of("a decomposed accent", "text:.", {"e\u0301/e\u0301.txt": GOOD}, code=0),
    of("a name in Latin-1", "text:d", {"d/caf\udce9.txt": GOOD}, code=0),
    of("a name in Latin-1, cleaned", "text:d", {"d/\udce9": GOOD}, code=0, clean="unicode"),
    of("a name with a line break", "text:d", {"d/a\nb": GOOD}, code=0),
    of("a name like a pattern", "text:d", {"d/[*]": GOOD}, code=0),
    of("an emoji as a name", "text:\U0001f600", {"\U0001f600": GOOD}, code=0),
]
LINES = b'{"text": "a line of text"}\n' * 99
GZ, ZST = gzip.compress(LINES), zstandard.compress(LINES)
BYTES = {  # what is no UTF-8 text
    "latin": b"caf\xe9 au lait",
    "cut character": b"abc\xe2\x82",
    "continuation": b"\x80abc",
    "surrogate": b"\xed\xa0\x80",
    "overlong": b"\xc0\xaf",
    "beyond Unicode": b"\xf4\x90\x80\x80",
    "five bytes": b"\xf8\x88\x80\x80\x80",
    "UTF-16": "text".encode("utf-16"),
    "UTF-32": "text".encode("utf-32"),
    "after a block": b"x" * (1 << 20) + b"\xff",
    "across blocks": b"x" * ((1 << 20) - 1) + b"\xe2\x82",
    "PNG": b"\x89PNG\r\n",
}
TEXT_CASES = [
    *(of(f"text: {n}", "text:x", {"x": raw}, "x is not UTF-8 (byte") for n, raw in BYTES.items()),
    *(of(f"gz: {n}", "text:x.gz", {"x.gz": gzip.compress(raw)}) for n, raw in BYTES.items()),
    *(
        of(f"{name} cut at {at}", f"{kind}:x.{name}", {f"x.{name}": raw[:at]}, "cannot be read")
        for name, raw in (("gz", GZ), ("zst", ZST))
        for kind in ("text", "jsonl")
        for at in (1, 4, len(raw) // 2, len(raw) - 9, len(raw) - 1)
    ),
    *(
        of(f"{name} with {what}", f"text:x.{name}", {f"x.{name}": raw})
        for name, good in (("gz", GZ), ("zst", ZST))
        for what, raw in (
            ("another format", b"PK\x03\x04 no such thing"),
            ("a flipped bit", good[:-6] + bytes([good[-6] ^ 1]) + good[-5:]),
            ("junk behind", good + b"junk"),
            ("nothing", b""),
        )
        if (name, what) != ("zst", "a flipped bit")  # a frame without a checksum cannot tell
    ),
    of("no file", "text:x", {}, "no file matches x"),
    of("an empty file", "text:x", {"x": b""}, "is empty"),
    of("one character", "text:x", {"x": b"a"}, "too short to hold out"),
    of("an empty folder", "text:d", {"d": lambda path: path.mkdir()}, "no file matches"),
    of("only hidden", "text:d", {"d/.x": GOOD}, "no file matches"),
    of("a pipe", "text:x", {"x": os.mkfifo}, "no file matches"),
    of("a dangling link", "text:x", {"x": lambda path: path.symlink_to("y")}, "no file matches"),
    of("a looping link", "text:x", {"x": lambda path: path.symlink_to("x")}, "no file matches"),
    of("a device", "text:/dev/null", {}, "no file matches"),
    of("below a file", "text:x/y", {"x": GOOD}, "no file matches"),
    of("a name of 300", f"text:{'x' * 300}", {}),
    of("a path of 9,999", f"text:{'x/' * 5000}", {}),
    of("nobody's home", "text:~nobody-here/x", {}, "cannot be listed"),
    of("NUL in a name", "text:a\0b", {}, "NUL"),
    of("a lone surrogate in a name", "text:\ud800", {}),
    of("not UTF-8 in a name", "text:caf\udce9", {}, "is not UTF-8"),
    of("many stars", f"text:{'**/' * 200}x", {"a/b/c/d/e/f/g/y": GOOD}, "no file matches"),
    of("stars by turns", f"text:{'**/*/' * 40}x", {"a/" * 60 + "y": GOOD}, "no file matches"),
    of("many brackets", f"text:{'[' * 2000}", {}),
]
SOURCES = [
    *(
        of(f"source {source[:30]!r}", source, {"x": GOOD}, says)
        for source, says in {
            "": "",
            ":": "is unknown",
            "text": "is unknown",
            "text:": "is unknown",
            "TEXT:x": "is unknown",
            "builtin:x": "is unknown",
            "x": "is unknown",
            "bin:x": "not a file of uint16 tokens",
            "task:x": "is unknown",
            "task:sentiment": "is unknown",
            "task:sentiment:": "is unknown",
            "task:poetry:x": "is unknown",
            "shards:": "holds no token shards",
            "shards:x": "",
            "shards:/": "holds no token shards",
            "shards:/dev/null": "",
            "shards:nowhere": "holds no token shards",
            "shards:" + "x" * 300: "",
            "shards:~nobody-here": "",
            "0*text:x": "weights must be above 0",
            "0.5*text:x,0*text:x": "weights must be above 0",
            "-1*text:x": "is unknown",
            "nan*text:x": "is unknown",
            "1e3*text:x": "is unknown",
            "1*": "is unknown",
            "1*text:x,": "no file matches",
            "1*text:x,1*": "is unknown",
            "1*1*text:x": "is unknown",
            "1*shards:d": "is unknown",
            "9" * 5000 + "*text:x": "a weight is no number",
            "http://x/y": "is unknown",
            "text:nosuchscheme://x": "cannot be listed",
            "tfds:": "is unknown",
            "tfds:no_such_thing": "",
            "tfds:../..": "",
            "warc:x": "x",
            "parquet:x": "x",
        }.items()
    ),
    *(
        of(f"clean={steps[:30]!r}", "text:x", {"x": GOOD}, "data.clean", clean=steps)
        for steps in ("html,", ",", "x", "pii:1", "near_dedup:", "near_dedup:0", "near_dedup:nan")
        + ("near_dedup:1e400", "near_dedup:-1", "near_dedup:x", "unicode:", "é", "x" * 9999)
        if steps not in ("html,", ",", "near_dedup:", "unicode:")  # which name no fault
    ),
    of("cleaned away", "text:x", {"x": b"\x01\x02"}, "drops every document", clean="unicode"),
    of("cleaning tokens", "bin:x", {"x": bytes(8)}, "cleans text", clean="unicode"),
    *(
        of(f"validation_fraction={value}", "text:x", {"x": GOOD}, validation_fraction=value)
        for value in ("0", "1", "-1", "nan", "inf", "1e400", "x")
    ),
    of("a bad validation source", "text:x", {"x": GOOD}, "no file", validation_source="text:y"),
    of("an empty validation source", "text:x", {"x": GOOD, "y": b""}, validation_source="text:y"),
    *(
        of(f"cache_dir={path}", "text:x", {"x": GOOD}, cache_dir=path)
        for path in ("x", "x/y", "/dev/null", "/proc/x", "n" * 300)
    ),
]
LLMC = np.array([20240520, 1, 2], "<i4").tobytes().ljust(1024, b"\0")
BIN_CASES = [
    of(f"bin: {name}", "bin:x", {"x": raw}, says)
    for name, raw, says in (
        ("empty", b"", "cannot be read"),
        ("odd", b"abc", "not a file of uint16"),
        ("an id too large", np.array([257], "<u2").tobytes(), "holds token 257"),
        ("only ends", np.array([256] * 9, "<u2").tobytes(), "is empty"),
        ("one token", np.array([65], "<u2").tobytes(), "too short"),
        ("a header alone", LLMC, "its header says 2"),
        ("a header cut", LLMC[:100], "its header says 2"),
        ("more than told", LLMC + bytes(6), "its header says 2"),
        ("none told", LLMC[:8] + bytes(1016), "its header says 0"),
        ("a negative count", LLMC[:8] + b"\xff" * 4 + bytes(1012), "its header says -1"),
        ("2 ** 31 told", LLMC[:8] + b"\xff\xff\xff\x7f" + bytes(1012), "its header says 21474"),
    )
]


def table(columns: dict) -> bytes:
    """A parquet file of these columns."""
    out = io.BytesIO()
    names = [name for name, _ in columns]
    arrays = [pyarrow.array(values) for _, values in columns]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names), out)
    return out.getvalue()


TABLE = table([("text", ["one text", "another"])])
BROKEN_STRINGS = pyarrow.Array.from_buffers(
    pyarrow.string(),
    1,
    [None, pyarrow.py_buffer(np.array([0, 2], np.int32)), pyarrow.py_buffer(b"\xff\xfe")],
)
PARQUET_CASES = [
    of(f"parquet: {name}", "parquet:x", {"x": raw}, says)
    for name, raw, says in (
        ("empty", b"", "cannot be read"),
        ("text", GOOD, "cannot be read as parquet"),
        ("cut", TABLE[:-9], "cannot be read as parquet"),
        ("only its end", TABLE[-40:], "cannot be read as parquet"),
        ("zeros in the middle", TABLE[:9] + bytes(len(TABLE) - 209) + TABLE[-200:], ""),
        ("no such column", table([("body", ["a"])]), "has no column 'text': it has body"),
        ("doubled", table([("text", ["a"]), ("text", ["b"])]), "more than one column 'text'"),
        ("no column", table([]), "has no column"),
        ("numbers", table([("text", [1, 2])]), "holds int64, not text"),
        ("bytes", table([("text", [b"a"])]), "holds binary, not text"),
        ("lists", table([("text", [["a"]])]), "not text"),
        ("objects", table([("text", [{"a": "b"}])]), "not text"),
        ("no row", table([("text", pyarrow.array([], pyarrow.string()))]), "is empty"),
        ("only nulls", table([("text", pyarrow.array([None], pyarrow.string()))]), "is empty"),
        ("not UTF-8", table([("text", BROKEN_STRINGS)]), "cannot be read as parquet"),
    )
]


def record(kind=b"response", body=b"", length=None, headers=b"", uri=b"http://x/") -> bytes:
    """One record of a web archive, its headers as given."""
    target = b"WARC-Target-URI: " + uri + b"\r\n" if uri is not None else b""
    length = str(len(body)).encode() if length is None else length
    return (
        b"WARC/1.0\r\nWARC-Type: " + kind + b"\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        b"WARC-Date: 2024-01-01T00:00:00Z\r\n" + target + headers + b"Content-Type:"
        b" application/http; msgtype=response\r\nContent-Length: "
        + length
        + b"\r\n\r\n"
        + body
        + b"\r\n\r\n"
    )


def page(body=b"<p>some text</p>", kind=b"text/html", headers=b"", status=b"200 OK") -> bytes:
    """A record that holds an HTTP answer."""
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: " + kind + b"\r\n" + headers + b"\r\n"
    return record(body=head + body)


CHARSETS = ["utf-7", "utf-16", "hex", "base64", "rot13", "idna", "punycode", "unicode_escape"]
CHARSETS += ["raw_unicode_escape", "undefined", "mbcs", "no-such", "utf-8-sig", "zlib", "x" * 999]
ODD_BYTES = b"<p>+2AA- \\ud800 caf\xe9 \xff\xfe xn--a</p>"
WARC_READ = [
    *(
        of(
            f"warc: charset {name[:20]}",
            "warc:x",
            {"x": page(ODD_BYTES, b"text/html; charset=" + name.encode())},
            code=0,
        )
        for name in CHARSETS
    ),
    *(
        of(
            f"warc: meta {name[:20]}",
            "warc:x",
            {"x": page(b"<meta charset=" + name.encode() + b">" + ODD_BYTES)},
            code=0,
        )
        for name in CHARSETS
    ),
    of("warc: no target", "warc:x", {"x": record(uri=None) + page()}, code=0),
    of("warc: no HTTP", "warc:x", {"x": record(body=b"junk") + page()}, code=0),
    of("warc: type of bytes", "warc:x", {"x": page(kind=b"\xff\xfe") + page()}, code=0),
    of("warc: gzip", "warc:x.gz", {"x.gz": gzip.compress(page())}, code=0),
    of("warc: many members", "warc:x.gz", {"x.gz": gzip.compress(page()) * 3}, code=0),
    of("warc: wet", "warc:x", {"x": record(b"conversion", "zwei é".encode())}, code=0),
    of("warc: wet in Latin-1", "warc:x", {"x": record(b"conversion", b"zwei \xe9")}, code=0),
]
WARC_ANY = [  # read as far as they go, or refused: the library decides
    Case(name, ["--config={}/c.py", "--config.data.source=warc:x"], {"c.py": CONFIG, "x": raw})
    for name, raw in {
        "length beyond 64 bits": record(b"conversion", b"text", b"9" * 40),
        "length of 5,000 digits": record(b"conversion", b"text", DIGITS),
        "negative length": record(b"conversion", b"text", b"-5"),
        "length of letters": record(b"conversion", b"text", b"abc"),
        "no length": record(b"conversion", b"text").replace(b"Content-Length: 4\r\n", b""),
        "two lengths": record(b"conversion", b"text", b"4\r\nContent-Length: 2"),
        "brotli": page(b"\x0b\x02\x80text\x03", headers=b"Content-Encoding: br\r\n"),
        "no brotli": page(b"junk", headers=b"Content-Encoding: br\r\n"),
        "no gzip": page(b"junk", headers=b"Content-Encoding: gzip\r\n"),
        "gzip cut": page(GZ[:9], headers=b"Content-Encoding: gzip\r\n"),
        "zstd": page(ZST, headers=b"Content-Encoding: zstd\r\n"),
        "deflate": page(b"junk", headers=b"Content-Encoding: deflate\r\n"),
        "no such encoding": page(headers=b"Content-Encoding: x\r\n"),
        "chunked": page(b"zz\r\ntext", headers=b"Transfer-Encoding: chunked\r\n"),
        "chunks without end": page(b"ffffffff\r\ntext", headers=b"Transfer-Encoding: chunked\r\n"),
        "negative chunk": page(b"-5\r\ntext", headers=b"Transfer-Encoding: chunked\r\n"),
        "empty status": page(status=b""),
        "status of letters": page(status=b"abc"),
        "no type": record(b"", b"text"),
        "a type of bytes": record(b"\xff\xfe", b"text"),
        "cut in a header": page()[:80],
        "an endless header": b"WARC/1.0\r\n" + b"x" * 100_000,
        "many headers": record(b"conversion", b"text", headers=b"X: y\r\n" * 9999),
        "header without colon": record(b"conversion", b"text", headers=b"no colon\r\n"),
        "revisit": record(b"revisit", b"text"),
        "ARC": b"filedesc://x 0.0.0.0 20240101000000 text/plain 9\n1 0 x\n\n",
        "ARC of nothing": b"http://x/ 0.0.0.0 2 text/html -1\n",
        "gzip of junk": gzip.compress(b"junk"),
        "one empty line": b"\n",
        "only blanks": b"\r\n" * 99,
    }.items()
]
WARC_CASES = [
    of("warc: empty", "warc:x", {"x": b""}),
    of("warc: text", "warc:x", {"x": GOOD}),
    of("warc: a page of no address", "warc:x", {"x": page().replace(b"WARC-Target-URI", b"X")}),
    of("warc: a body cut", "warc:x", {"x": page()[:-12]}, "x is cut short in record 1"),
    of("warc: a huge length", "warc:x", {"x": record(b"conversion", b"a", b"9" * 14)}, "cut short"),
    of("warc: a frame cut", "warc:x.zst", {"x.zst": zstandard.compress(page())[:-3]}),
    of("warc: a member cut", "warc:x.gz", {"x.gz": gzip.compress(page())[:-9]}),
    of("warc: only a redirect", "warc:x", {"x": page(status=b"301 Moved")}, "is empty"),
    of("warc: only a picture", "warc:x", {"x": page(kind=b"image/png")}, "is empty"),
]
CASES = [*JSON_CASES, *READ, *TEXT_CASES, *SOURCES, *BIN_CASES, *PARQUET_CASES]
CASES += [*WARC_READ, *WARC_ANY, *WARC_CASES]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_prepare(holds, tmp_path, case):
    code, out, err = holds(prepare.main, case)
    if code == 0:
        found = json.loads(out.splitlines()[-1])
        assert found["documents"] and found["tokens"] > found["bytes"] * 0.5
        return
    assert not out and len(err.splitlines()) - err.startswith("data ") <= 1, err
    left = {path.name for path in Path(tmp_path / "cache").glob("*")}
    assert left <= {"locks", "digests.json"}, "no half of a corpus"
