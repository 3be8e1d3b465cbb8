"""Tokenizer files nobody should write, files nobody may read, bounds on memory.

And mutated bytes for every reader of text, tokens, tokenizers and caches.
"""

import gzip
import json
import os
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from jaxgpt import prepare
from jaxgpt.config import DataConfig
from jaxgpt.data.prepare import prepare as prepare_data
from jaxgpt.data.prepare import read_prepared
from jaxgpt.system.errors import BadInput
from jaxgpt.text import files, formats, pieces
from jaxgpt.text.cleaning import make_steps
from jaxgpt.text.sources import open_sources
from jaxgpt.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.base import ByteTokenizer, TrainingText
from jaxgpt.tokenizer.load import KIND_FILE, KINDS
from tests.conftest import CORPUS
from tests.hostile.conftest import FUZZ, Case, mutated, name_of, refused
from tests.hostile.test_data import CONFIG, GOOD, TABLE, ZST, page, record

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = {piece: number for number, piece in enumerate([*ALPHABET, "<|endoftext|>"])}
MERGES = "#version: 0.2\n"
JSON_VOCAB = json.dumps(VOCAB)
GPT2 = {"t/vocab.json": JSON_VOCAB, "t/merges.txt": MERGES}
SINGLE = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": VOCAB, "merges": []}})
END = {"t/config.json": '{"eos_token_id": 256}'}
DIGITS = "9" * 5000


def of(kind: str, name: str, stored: dict, says: str = "") -> Case:
    """A case of `prepare` with the tokenizer `kind:t`, whose files are `stored`."""
    argv = ["--config={}/c.py", "--config.data.source=text:x", f"--config.data.tokenizer={kind}:t"]
    return Case(f"{kind}: {name}", argv, {"c.py": CONFIG, "x": GOOD} | stored, says, (2,))


NO_JSON = {"empty": "", "null": "null", "a list": "[]", "a number": "3", "a string": '"x"'}
NO_JSON |= {"cut": '{"a', "deep": "[" * 99_999, "digits": '{"a": ' + DIGITS + "}", "NUL": "\0"}
NO_JSON |= {"Latin-1": b"\xe9", "half a pair": '{"\\ud800": 1}', "an empty object": "{}"}
MODELS = {
    "no model": {},
    "a model of no type": {"model": {"type": "no such"}},
    "an empty vocabulary": {"model": {"type": "BPE", "vocab": {}, "merges": []}},
    "a merge of nothing": {"model": {"type": "BPE", "vocab": {"a": 256}, "merges": ["a b"]}},
    "a merge of one": {"model": {"type": "BPE", "vocab": {"a": 256}, "merges": ["a"]}},
    "an id of 2**32 - 1": {
        "model": {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "a"}
    },
    "an id of 2**40": {"model": {"type": "WordLevel", "vocab": {"a": 2**40}, "unk_token": "a"}},
    "a negative id": {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
    "no unknown token": {"model": {"type": "WordLevel", "vocab": {"a": 256}, "unk_token": "x"}},
    "Unigram's unknown": {"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}},
}
TOKENIZERS = [
    *(of("hf", n, END | {"t/tokenizer.json": text}) for n, text in NO_JSON.items()),
    *(of("hf", n, END | {"t/tokenizer.json": json.dumps(m)}) for n, m in MODELS.items()),
    *(
        of("hf", f"config {n}", {"t/tokenizer.json": SINGLE, "t/config.json": text})
        for n, text in NO_JSON.items()
    ),
    *(
        of(
            "hf",
            f"end {end[:9]}",
            {"t/tokenizer.json": SINGLE, "t/config.json": f'{{"eos_token_id": {end}}}'},
        )
        for end in ("-1", "257", "1e9", "true", "null", "[]", '"x"', "[null]", DIGITS, "NaN", "0.5")
    ),
    of("hf", "no folder", {}, "holds no tokenizer.json"),
    of("hf", "a file", {"t": "x"}, "holds no tokenizer.json"),
    of("hf", "no end", {"t/tokenizer.json": SINGLE}, "names its end-of-text token"),
    of("hf", "a folder for the file", END | {"t/tokenizer.json/x": ""}, "holds no tokenizer.json"),
    *(of("gpt2", f"vocab {n}", GPT2 | {"t/vocab.json": text}) for n, text in NO_JSON.items()),
    *(of("gpt2", f"single {n}", {"t/tokenizer.json": text}) for n, text in NO_JSON.items()),
    *(of("gpt2", f"single {n}", {"t/tokenizer.json": json.dumps(m)}) for n, m in MODELS.items()),
    *(
        of("gpt2", f"merges {n}", GPT2 | {"t/merges.txt": text})
        for n, text in {
            "of bytes": b"\xff\xfe",
            "of one": "a\n",
            "of three": "a b c\n",
            "of strangers": "ab cd\n",
            "of blanks": "  \n",
            "of NUL": "\0 \0\n",
        }.items()
    ),
    of(
        "gpt2",
        "no end",
        GPT2 | {"t/vocab.json": json.dumps(dict(list(VOCAB.items())[:256]))},
        "lacks <|endoftext|>",
    ),
    of("gpt2", "a gap", GPT2 | {"t/vocab.json": json.dumps(VOCAB | {"x": 999})}, "does not number"),
    of("gpt2", "one id twice", GPT2 | {"t/vocab.json": json.dumps(VOCAB | {"x": 3})}, "not number"),
    of("gpt2", "an id of text", GPT2 | {"t/vocab.json": json.dumps(VOCAB | {"x": "3"})}, "string"),
    of(
        "gpt2",
        "bytes missing",
        GPT2 | {"t/vocab.json": '{"a": 0, "<|endoftext|>": 1}'},
        "255 of the 256",
    ),
    of("gpt2", "no folder", {}, "does not exist"),
    of("gpt2", "nothing in it", {"t/x": ""}, "holds no GPT-2 vocabulary"),
    *(
        of("sentencepiece", n, {"t": raw}, "t is not a SentencePiece model")
        for n, raw in {
            "empty": b"",
            "text": GOOD,
            "zeros": bytes(99),
            "JSON": b"{}",
            "ones": b"\xff" * 99,
        }.items()
    ),
    of("sentencepiece", "no file", {}, "t does not exist"),
    of("sentencepiece", "a folder", {"t/x": ""}, "t does not exist"),
    *(
        Case(
            f"spec {spec[:20]!r}",
            ["--config={}/c.py", f"--config.data.tokenizer={spec}"],
            {"c.py": CONFIG},
            "",
            (2,),
        )
        for spec in (
            *("", ":", "x", "bytes", "byte:", "char:x", "gpt2", "gpt2:", "hf", "hf:", "tiktoken:x"),
            *("sentencepiece", "sentencepiece:", "sentencepiece:0", "sentencepiece:299"),
            *(
                "sentencepiece:-400",
                "sentencepiece:4e3",
                "sentencepiece:bpe:",
                "sentencepiece:x:400",
            ),
            *(f"sentencepiece:{DIGITS}", "hf:~nobody-here", "gpt2:~nobody-here", "hf:" + "x" * 300),
            *("sentencepiece:~nobody-here", "hf:/dev/null", "sentencepiece:/dev/null", "gpt2:/"),
        )
    ),
    *(
        Case(
            f"special {names[:20]!r}",
            [
                "--config={}/c.py",
                "--config.data.source=text:x",
                f"--config.data.special_tokens={names}",
            ],
            {"c.py": CONFIG, "x": GOOD},
            "",
            (2,),
        )
        for names in (",", "<a>,<a>", "<a>,,<b>", " ", "<a>, <a>")
    ),
]


@pytest.mark.parametrize("case", TOKENIZERS, ids=name_of)
def test_tokenizers(holds, tmp_path, case):
    holds(prepare.main, case)
    assert {p.name for p in (tmp_path / "cache").glob("*")} <= {"locks", "digests.json"}


def documents(source: str, tokenizer=None, field: str = "text") -> list:
    """Reads everything of `source`, as `prepare` does."""
    cfg = DataConfig(source=source, field=field)
    with tempfile.TemporaryDirectory() as cache:
        for one in open_sources(source, cfg, Path(cache), tokenizer):
            one.identity()
            return list(one.documents())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


ROW = b'{"text": "a text", "prompt": "a", "response": "b", "label": 1, "premise": "c",'
ROW += b' "hypothesis": "d", "context": "e", "question": "f", "answers": {"text": ["g"]}}\n'
CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
SHAREGPT = b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
ALPACA = b'{"instruction": "a", "input": "b", "output": "c"}\n'
PAGES = page(b"<meta charset=utf-7>+2AA-", b"text/html; charset=utf-8") + page(kind=b"text/plain")
ARCHIVE = PAGES + record(b"conversion", "zwei é".encode(), uri=None)
FUZZED = {
    "jsonl:": [ROW * 2],
    "sft:": [ROW * 2, CHAT * 2, SHAREGPT * 2, ALPACA * 2],
    "task:sentiment:": [ROW * 2],
    "task:entailment:": [ROW],
    "task:questions:": [ROW],
    "text:": [GOOD, "日本語 é".encode()],
    "warc:": [ARCHIVE, gzip.compress(ARCHIVE)],
    "parquet:": [TABLE],
    "bin:": [bytes(40), b"\x01\x01" * 20],
}


@pytest.mark.parametrize("kind", FUZZED)
@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_sources_of_any_bytes(folder, kind, data):
    (folder / "x").write_bytes(data.draw(mutated(*FUZZED[kind])))
    tokenizer = ByteTokenizer() if kind == "bin:" else None
    if not refused(documents, f"{kind}{folder}/x", tokenizer):
        for piece in documents(f"{kind}{folder}/x", tokenizer):
            piece.text.encode()


@pytest.mark.parametrize("name", ["x.gz", "x.zst"])
@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_compressed_files_of_any_bytes(folder, name, data):
    good = gzip.compress(GOOD * 9, mtime=0) if name == "x.gz" else ZST
    (folder / name).write_bytes(data.draw(mutated(good)))
    refused(documents, f"jsonl:{folder}/{name}")


PARTS = [
    "text:",
    "jsonl:",
    "bin:",
    "task:",
    "shards:",
    "builtin",
    "0.5*",
    "1*",
    ",",
    "~",
    "**",
    "/",
]
PARTS += [":", "[", "]", "*", "\0", "\ud800", "é", "://", "file", "memory://", "..", "x", " "]


@settings(FUZZ, max_examples=200)
@given(st.lists(st.sampled_from(PARTS), max_size=6).map("".join))
def test_sources_of_any_name(folder, monkeypatch, source):
    monkeypatch.chdir(folder)
    if "/" in source and "**" in source:
        source = source.replace("/", "")  # not the whole disk
    with tempfile.TemporaryDirectory() as cache:
        refused(open_sources, source, DataConfig(), Path(cache), ByteTokenizer())


@settings(FUZZ, max_examples=100)
@given(st.text(st.sampled_from("near_dedup:0.5,pii html unicode-é"), max_size=20))
def test_steps_of_any_name(steps):
    refused(make_steps, steps)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind of tokenizer, as it is saved."""
    root = tmp_path_factory.mktemp("saved")
    text = TrainingText(lambda: iter([CORPUS]), len(CORPUS))
    (root / "gpt2-source").mkdir()
    for name, content in GPT2.items():
        (root / "gpt2-source" / Path(name).name).write_text(content)
    words = FastTokenizer(models.WordLevel({"<end>": 0, "a": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (root / "hf-source").mkdir()
    words.save(str(root / "hf-source/tokenizer.json"))
    (root / "hf-source/config.json").write_text('{"eos_token_id": 0}')
    specs = {"byte": "byte", "char": "char", "sentencepiece": "sentencepiece:400"}
    specs |= {"gpt2": f"gpt2:{root}/gpt2-source", "hf": f"hf:{root}/hf-source"}
    for kind, spec in specs.items():
        save_tokenizer(make_tokenizer(spec, [text], "<|a|>,<|b|>"), root / kind)
    assert set(specs) == set(KINDS)
    return {kind: root / kind for kind in specs}


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_saved_tokenizers_of_any_bytes(saved, folder, kind, data):
    """A damaged file is refused, or what is read works: it encodes, decodes and can be saved."""
    name = data.draw(st.sampled_from(sorted(p.name for p in saved[kind].iterdir())))
    shutil.rmtree(folder / "t", ignore_errors=True)
    shutil.copytree(saved[kind], folder / "t")
    (folder / "t" / name).write_bytes(data.draw(mutated((folder / "t" / name).read_bytes())))

    def use() -> None:
        tokenizer = load_tokenizer(folder / "t")
        ids = tokenizer.encode("a text <|a|> é\n")
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        tokenizer.decode([*ids, *range(min(tokenizer.vocab_size, 500))]).encode()
        save_tokenizer(tokenizer, folder / "again")

    refused(use)


def test_kind_files_of_any_kind(saved, folder):
    for kind in sorted(KINDS):
        shutil.copytree(saved[kind], folder / f"k-{kind}")
        for text in ("", "null", "{}", '{"kind": "x"}', '{"kind": [], "vocab_size": 1}', "\xff"):
            (folder / f"k-{kind}" / KIND_FILE).write_text(text, encoding="latin-1")
            assert refused(load_tokenizer, folder / f"k-{kind}"), text


@settings(FUZZ, max_examples=120)
@given(data=st.data())
def test_stored_corpora_of_any_bytes(folder, data):
    """Whatever is damaged is noticed: what is read holds the tokens that were written."""
    if not (folder / "good").exists():
        (folder / "t.txt").write_text(CORPUS[:3000])
        cfg = DataConfig(source=f"text:{folder}/t.txt", tokenizer="char")
        prepare_data(cfg, str(folder / "good"))
    good = read_prepared(folder / "good")
    shutil.rmtree(folder / "bad", ignore_errors=True)
    shutil.copytree(folder / "good", folder / "bad")
    name = data.draw(
        st.sampled_from(
            sorted(
                str(p.relative_to(folder / "good"))
                for p in (folder / "good").rglob("*")
                if p.is_file()
            )
        )
    )
    raw = (folder / "good" / name).read_bytes()
    (folder / "bad" / name).write_bytes(data.draw(mutated(raw)))
    if not refused(read_prepared, folder / "bad"):
        bad = read_prepared(folder / "bad")
        assert bad.fingerprint == good.fingerprint and bad.train.files == good.train.files
        assert bytes(bad.train.tokens) == bytes(good.train.tokens)
        assert bytes(bad.train.starts) == bytes(good.train.starts)


ZEROS = 48 << 20  # bytes that come out of a file of 47 KB


@pytest.mark.parametrize("kind", ["jsonl", "sft", "task:sentiment"])
@pytest.mark.parametrize("name", ["x.gz", "x.zst", "x"])
def test_a_line_without_end_takes_no_memory(folder, monkeypatch, kind, name):
    monkeypatch.setattr(files, "LONGEST", 1 << 20)
    raw = (b"{" if kind == "sft" else b"\0") * ZEROS
    pack = {"x.gz": lambda r: gzip.compress(r, 1), "x.zst": zstandard.compress, "x": bytes}[name]
    (folder / name).write_bytes(pack(raw))
    del raw
    tracemalloc.start()
    with pytest.raises(BadInput, match=f"{name}, line 1 is longer than 1,048,576 bytes"):
        documents(f"{kind}:{folder}/{name}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < ZEROS / 2 or name == "x.zst", f"{peak:,} bytes"  # zstd: 4 KB at a time


def test_a_record_without_end_takes_no_memory(folder, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST", 1 << 20)
    (folder / "w").write_bytes(gzip.compress(record(b"conversion", bytes(ZEROS)), 1))
    tracemalloc.start()
    with pytest.raises(BadInput, match="w, record 1 is over 1,048,576 bytes"):
        documents(f"warc:{folder}/w")
    assert tracemalloc.get_traced_memory()[1] < ZEROS / 3
    tracemalloc.stop()


def test_a_document_without_end_takes_no_memory(holds, tmp_path, monkeypatch):
    """Text comes in pieces; only what must see a document whole has a bound."""
    monkeypatch.setattr(pieces, "LONGEST_WHOLE", 1 << 20)
    zeros = gzip.compress(bytes(ZEROS // 8), 1)
    argv = ["--config={}/c.py", "--config.data.source=text:x.gz"]
    stored = {"c.py": CONFIG, "x.gz": zeros, **END, "t/tokenizer.json": SINGLE}
    assert holds(prepare.main, Case("pieces", argv, stored, exits=(0,)))[0] == 0
    for more in ("clean=pii", "tokenizer=hf:t"):
        says = "x.gz is a document of more than 1,048,576 characters"
        holds(prepare.main, Case(more, [*argv, f"--config.data.{more}"], stored, says, (2,)))


@pytest.fixture
def nobody(command):
    """A folder in which this process may not do everything: as root it becomes another user."""
    root = Path(tempfile.mkdtemp(prefix="jaxgpt-nobody-"))
    root.chmod(0o777)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXGPT_CACHE", str(root / "cache"))
        patch.chdir(root)
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(65534)
        try:
            yield root
        finally:
            if was_root:
                os.seteuid(0)
            for path in root.rglob("*"):
                path.chmod(0o700)
            shutil.rmtree(root)


@pytest.mark.parametrize(
    ("source", "locked"),
    [
        *((f"{kind}:x", "x") for kind in ("text", "jsonl", "sft", "task:sentiment", "bin", "warc")),
        *(("parquet:x", "x"), ("text:x.gz", "x.gz"), ("text:d", "d"), ("text:d/**/*", "d/e")),
        *(("text:d/e/x", "d"), ("text:d/*/x", "d/e"), ("shards:d", "d"), ("shards:.", "meta.json")),
        *(("text:ok", "cache"), ("text:ok", "out"), ("text:ok", "t"), ("text:ok", "t/config.json")),
        *(("text:ok", "t/tokenizer.json"), ("text:ok", "model"), ("text:ok", "c.py")),
    ],
)
def test_what_may_not_be_read_or_written(command, nobody, source, locked):
    for name in ("x", "x.gz", "d/e/x", "ok", "meta.json", "t/config.json", "t/tokenizer.json"):
        (nobody / name).parent.mkdir(parents=True, exist_ok=True)
        (nobody / name).write_bytes(
            END.get(name, SINGLE if "json" in name else "a text\n" * 9).encode()
        )
    (nobody / "model").write_bytes(b"x")
    (nobody / "c.py").write_text(CONFIG)
    for name in ("cache", "out"):
        (nobody / name).mkdir()
    (nobody / locked).chmod(0)
    tokenizer = {"t": "hf:t", "m": "sentencepiece:model"}.get(locked[0], "byte")
    argv = [
        "--config=c.py",
        f"--config.data.source={source}",
        f"--config.data.tokenizer={tokenizer}",
    ]
    argv += ["--out=out/new"] if locked == "out" else []
    code, out, err = command(prepare.main, *argv)
    assert (code, out) == (2, "") and "Traceback" not in err, err
    assert [line[:7] for line in err.splitlines() if line.startswith("error: ")] == ["error: "]
    assert not list(nobody.glob("cache/*/meta.json")) and not list(nobody.glob("cache/.*tmp"))
