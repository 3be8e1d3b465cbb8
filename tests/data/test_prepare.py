"""Token shards: what is in them, that they are cached, whole, and told apart."""

import json
import os
import re
import shutil
import signal
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from jaxgpt import prepare as prepare_command
from jaxgpt import train as train_command
from jaxgpt.config import DataConfig
from jaxgpt.data import prepare as module
from jaxgpt.data import shards
from jaxgpt.data.cache import load_or_write
from jaxgpt.data.prepare import prepare, prepare_whole, read_prepared
from jaxgpt.data.shards import read_meta
from jaxgpt.system.errors import BadInput
from jaxgpt.text import formats
from jaxgpt.tokenizer import make_tokenizer
from tests.conftest import CORPUS, config_flag, wait_until
from tests.data.damage import DAMAGE
from tests.processes.forks import Python
from tests.processes.processes import finish


def config(corpus, **fields):
    return DataConfig(source=f"text:{corpus}/*.txt", validation_fraction=0.25, **fields)


def test_stream_has_end_of_text_in_front_of_each_document(corpus):
    data = prepare(config(corpus))
    texts = [(corpus / f"{i}.txt").read_bytes() for i in range(4)]
    expected = np.concatenate([[256, *text] for text in texts[:3]])
    np.testing.assert_array_equal(data.train.tokens, expected)
    np.testing.assert_array_equal(data.validation.tokens, [256, *texts[3]])
    assert (data.train.documents, data.validation.documents) == (3, 1)
    assert data.validation.bytes == len(texts[3])


def test_cached_until_something_that_matters_changes(corpus, monkeypatch):
    first = prepare(config(corpus))
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_splits", lambda *a: pytest.fail("should come from the cache"))
        assert prepare(config(corpus)).folder == first.folder
    folders = {first.folder}
    folders.add(prepare(config(corpus, tokenizer="sentencepiece:400")).folder)
    folders.add(prepare(DataConfig(source=f"text:{corpus}/*.txt")).folder)
    (corpus / "3.txt").write_text("changed")
    folders.add((last := prepare(config(corpus))).folder)
    assert len(folders) == 4
    assert last.fingerprint != first.fingerprint


def test_a_validation_source_leaves_the_corpus_whole(corpus, tmp_path):
    (tmp_path / "v.txt").write_text("held out")
    data = prepare(config(corpus, validation_source=f"text:{tmp_path}/v.txt"))
    assert data.train.documents == 4
    assert bytes(data.validation.tokens[1:].astype(np.uint8)) == b"held out"


def test_the_tokenizer_is_trained_on_the_training_part_only(tmp_path):
    (tmp_path / "a.txt").write_text(CORPUS)
    (tmp_path / "b.txt").write_text("qzqzqz " * 300)
    source = f"text:{tmp_path}/*.txt"
    data = prepare(
        DataConfig(source=source, tokenizer="sentencepiece:400", validation_fraction=0.15)
    )
    assert data.validation.documents == 1
    assert len(data.tokenizer.encode("qzqz")) == 4, "no piece was learnt from the held-out text"


def test_a_failure_leaves_nothing_behind(corpus, tmp_path):
    (corpus / "3.txt").write_bytes(b"\xff")
    out = tmp_path / "out"
    with pytest.raises(BadInput, match="3.txt is not UTF-8"):
        prepare(config(corpus), str(out))

    def fail(scratch):
        (scratch / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        load_or_write(out, tmp_path / "cache/locks", fail, read_prepared)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "corpus"]


STORED = [
    *(f"{split}.{kind}" for split in ("train", "validation") for kind in ("bin", "documents")),
    *("train.origins", "meta.json", ".verified.json"),
    *("tokenizer/tokenizer_kind.json", "tokenizer/characters.json"),
]


@pytest.fixture(scope="module")
def cached_corpus(tmp_path_factory):
    """A prepared corpus to copy, its fingerprint and its config."""
    folder = tmp_path_factory.mktemp("cached")
    for i in range(4):
        (folder / f"{i}.txt").write_text(CORPUS[500 * i : 500 * (i + 1)])
    cfg = config(folder, tokenizer="char")
    return prepare(cfg, str(folder / "out")), cfg


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", STORED)
def test_a_damaged_cache_is_made_anew_and_a_damaged_folder_named(
    cached_corpus, tmp_path, capsys, monkeypatch, name, damage
):
    """Every file of a prepared corpus, damaged in every way: one line, and the same batches.

    A folder that the user named is not written to: the message says what to do.
    """
    whole, cfg = cached_corpus
    key = read_meta(whole.folder)["key"]
    cache, named = tmp_path / "cache" / key, tmp_path / "named"
    for folder in (cache, named):
        shutil.copytree(whole.folder, folder)
        read_prepared(folder)
        DAMAGE[damage](folder / name)
    capsys.readouterr()
    again = prepare(cfg)
    told = [line for line in capsys.readouterr().err.splitlines() if "preparing" not in line]
    told = [line for line in told if "training char" not in line]
    assert again.fingerprint == whole.fingerprint and again.folder == cache
    if name != ".verified.json":
        assert len(told) == 1 and re.match(r"data      .*; it is made anew", told[0]), told
        with pytest.raises(BadInput, match=r"named.*(delete .*/named and prepare again|--out)"):
            prepare(DataConfig(source=f"shards:{named}"))
    else:
        assert len(told) <= 1 and prepare(DataConfig(source=f"shards:{named}"))
    monkeypatch.setattr(module, "_write_corpus", lambda *a: pytest.fail("it is whole now"))
    assert prepare(cfg).fingerprint == whole.fingerprint
    text = again.tokenizer.decode(again.train.tokens)
    assert text == whole.tokenizer.decode(whole.train.tokens)


def test_one_bit_anywhere_in_meta_is_noticed(cached_corpus, tmp_path):
    whole, _ = cached_corpus
    raw = (whole.folder / "meta.json").read_bytes()
    for at in range(0, len(raw), 13):
        changed = bytearray(raw)
        changed[at] ^= 1 << at % 8
        (tmp_path / "meta.json").write_bytes(changed)
        try:
            found = read_meta(tmp_path)
        except BadInput as e:
            assert "Traceback" not in str(e)
        else:
            assert found == read_meta(whole.folder), "white space may change"


@pytest.mark.parametrize("when", ["measure", "write_splits"])
@pytest.mark.parametrize("how", ["replaced", "same size and time", "restored", "gone"])
def test_a_source_that_changes_meanwhile(corpus, monkeypatch, how, when):
    """Never the old text under the new key, nor the new one under the old."""
    file = corpus / "3.txt"
    text, status = file.read_text(), file.stat()
    original = getattr(module, when)

    def meddled(*args):
        found = original(*args)
        if how == "gone":
            file.unlink(missing_ok=True)
            return found
        (corpus / "new").write_text(text.upper())
        os.utime(corpus / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        (corpus / "new").replace(file)
        if how == "restored":
            (corpus / "old").write_text(text)
            (corpus / "old").replace(file)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module, when, meddled)
        with pytest.raises(BadInput, match="3.txt (changed while it was read|cannot be read)"):
            prepare(config(corpus))
    assert not list(Path(os.environ["JAXGPT_CACHE"]).glob("*/meta.json"))
    if how != "gone":
        data = prepare(config(corpus))
        found = bytes(data.validation.tokens[1:].astype(np.uint8)).decode()
        assert found == (text if how == "restored" else text.upper())


def test_a_change_within_the_time_stamp_is_noticed(corpus, monkeypatch):
    """Files written just now are compared by their bytes: the clock of time stamps is coarse."""
    file, original = corpus / "3.txt", module.write_splits
    stamp = module.file_stamp(str(file))

    def meddled(*args):
        file.write_text(file.read_text().upper())
        return original(*args)

    monkeypatch.setattr(module, "file_stamp", lambda file: stamp)
    monkeypatch.setattr(module, "write_splits", meddled)
    with pytest.raises(BadInput, match="the text changed while it was read"):
        prepare(config(corpus))


def test_an_interrupt_leaves_nothing_and_the_next_run_starts_clean(command, corpus, tmp_path):
    flag = config_flag(tmp_path, f"data=DataConfig(source='text:{corpus}/*.txt', tokenizer='char')")
    argv, original = [flag], module.write_splits
    # where tests run in the background, SIGINT is ignored
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "write_splits", lambda *a, n=number: signal.raise_signal(n))
            found, out, err = command(prepare_command.main, *argv)
        assert (found, out) == (code, "") and "Traceback" not in err
        assert err.splitlines()[-1].endswith("is not kept: the next run starts clean")
        left = [p.name for p in (tmp_path / "cache").iterdir()]
        assert left == ["locks"], "no half of a corpus"
    signal.signal(signal.SIGINT, previous)
    assert module.write_splits is original
    assert command(prepare_command.main, *argv)[0] == 0


@pytest.mark.parametrize(
    "out", [".", "/", "..", "full", "full/.", "./full", "file", "~nobody-here/x"]
)
def test_out_never_overwrites_what_is_there(command, corpus, tmp_path, monkeypatch, out):
    flag = config_flag(tmp_path, f"data=DataConfig(source='text:{corpus}/*.txt')")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    monkeypatch.chdir(tmp_path)
    code, _, err = command(prepare_command.main, flag, f"--out={out}")
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), err
    assert (tmp_path / "full/mine").read_text() == (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert command(prepare_command.main, flag, "--out=.")[0] == 2
    code, _, err = command(prepare_command.main, flag, "--out=../new")
    assert code == 0 and (tmp_path / "new/meta.json").exists(), err


def test_checksums_of_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CRC_BLOCK", 10)
    (tmp_path / "f").write_bytes(bytes(size for size in (3, 7, 0, 25, 1) for _ in range(size)))
    sums = {"f": shards.checksums_of(tmp_path / "f")}
    assert sums["f"]["bytes"] == 36 and len(sums["f"]["crc32"]) == 4
    shards.verify_checksums(tmp_path, sums)
    sums["f"]["crc32"][2] += 1
    (tmp_path / shards.VERIFIED).unlink()
    with pytest.raises(BadInput, match="between bytes 20 and 30 its checksum differs"):
        shards.verify_checksums(tmp_path, sums)


def test_what_a_killed_prepare_left_is_replaced(corpus, tmp_path):
    """SIGKILL while it writes; the next one starts clean and leaves only whole corpora."""
    big = tmp_path / "big.txt"
    big.write_text(CORPUS * 200)
    code = (
        "from jaxgpt.config import DataConfig; from jaxgpt.data.prepare import prepare;"
        f"prepare(DataConfig(source='text:{big}', tokenizer='sentencepiece:400'))"
    )
    cache = Path(os.environ["JAXGPT_CACHE"])
    child = Python("-c", code)
    wait_until(lambda: list(cache.glob(".*.tmp/train.bin")), child)
    child.kill()
    child.wait()
    assert list(cache.glob(".*.tmp")), "killed in the middle of it"
    data = prepare(DataConfig(source=f"text:{big}", tokenizer="sentencepiece:400"))
    assert not list(cache.glob(".*.tmp"))
    whole = prepare(
        DataConfig(
            source=f"text:{big}", tokenizer="sentencepiece:400", cache_dir=str(tmp_path / "other")
        )
    )
    assert whole.fingerprint == data.fingerprint


def test_two_at_once_do_not_clash(corpus):
    code = (
        "from jaxgpt.config import DataConfig; from jaxgpt.data.prepare import prepare;"
        f"print(prepare(DataConfig(source='text:{corpus}/*.txt', validation_fraction=0.25,"
        " tokenizer='sentencepiece:400')).folder)"
    )
    codes, outs, errors = finish([Python("-c", code) for _ in range(3)])
    assert codes == [0, 0, 0] and len(set(outs)) == 1, errors


def test_a_full_disk_leaves_nothing(corpus, tmp_path):
    """A limit on the size of a file stands for a full disk: the same error, without root."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from jaxgpt.cli.run import run; from jaxgpt.config import DataConfig;"
        "from jaxgpt.data.prepare import prepare;"
        f"run(lambda argv: prepare(DataConfig(source='text:{corpus}/*.txt'), '{tmp_path}/out'))"
    )
    (code,), _, (err,) = finish([Python("-c", code)])
    assert code == 2, err
    assert re.fullmatch(r"(data .*\n)*error: cannot write .*/out: .*too large.*\n", err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "corpus"]


def test_a_full_tmpfs_leaves_nothing(corpus, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk])
    if mounted.returncode:
        pytest.skip("only root may mount; the test above covers the rest")
    try:
        with pytest.raises(BadInput, match="cannot write .*No space left"):
            prepare(config(corpus), str(disk / "out"))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_cleaning_is_counted_explained_and_in_the_key(command, corpus, tmp_path):
    (corpus / "4.txt").write_text((corpus / "0.txt").read_text())
    (corpus / "5.txt").write_text("\x00\x01")
    plain = prepare(config(corpus))
    data = prepare(config(corpus, clean="unicode,exact_dedup"))
    assert data.folder != plain.folder and data.train.documents + data.validation.documents == 4
    assert {rule: entry["documents"] for rule, entry in data.dropped.items()} == {
        "unicode": 1,
        "exact_dedup": 1,
    }
    assert [e["where"] for e in data.dropped["exact_dedup"]["examples"]] == [str(corpus / "4.txt")]
    assert not list(data.folder.glob("*.spool"))
    flag = config_flag(tmp_path)
    code, stdout, stderr = command(
        prepare_command.main,
        flag,
        "--explain",
        f"--config.data.source=text:{corpus}/*.txt",
        "--config.data.clean=unicode,exact_dedup",
        f"--against=text:{corpus}/0.txt",
    )
    found = json.loads(stdout.splitlines()[-1])
    assert code == 0 and found["dropped"] == {"unicode": 1, "exact_dedup": 1}
    assert "exact_dedup dropped 1 documents" in stderr and f"{corpus}/4.txt: " in stderr
    assert found["against"]["worst"][0]["share"] == 1.0
    with pytest.raises(BadInput, match="drops every document of text"):
        prepare(DataConfig(source=f"text:{corpus}/5.txt", clean="unicode"))


def test_masks_are_counted_and_shown(command, tmp_path):
    """`clean=pii` drops nothing, and does not say that nothing was done."""
    rows = ["write to ann@x.org or bob@y.org", "no address", "8.8.8.8 and cy@z.org", "8.8.4.4"]
    for number, text in enumerate(rows):
        (tmp_path / f"{number}.txt").write_text(text)
    flag = config_flag(tmp_path)
    argv = (flag, "--explain", f"--config.data.source=text:{tmp_path}/*.txt")
    for again in ("written", "from the cache"):
        code, out, err = command(prepare_command.main, *argv, "--config.data.clean=pii")
        found = json.loads(out.splitlines()[-1])
        assert code == 0 and found["dropped"] == {}, again
        assert found["masked"] == {"email": 3, "ip": 2}
        assert "nothing was dropped" not in err
        assert "pii masked 3 email addresses in 2 documents" in err
        assert "pii masked 2 ip addresses in 2 documents" in err
        assert "0.txt: write to email@example.com or email@example.com" in err
        assert "ann@x.org" not in err
    (tmp_path / "4.txt").write_text(rows[0])  # masked first, then dropped: not counted as masked
    _, out, _ = command(prepare_command.main, *argv, "--config.data.clean=pii,exact_dedup")
    found = json.loads(out.splitlines()[-1])
    assert (found["masked"], found["dropped"]) == ({"email": 3, "ip": 2}, {"exact_dedup": 1})
    _, out, err = command(prepare_command.main, *argv)
    assert "nothing was dropped or masked" in err
    assert "masked" not in json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    ("made", "asked", "special", "refused"),
    [
        ("sentencepiece:400", "sentencepiece:400", "", False),
        ("sentencepiece:400", "sentencepiece:410", "", True),
        ("sentencepiece:400", "char", "", True),
        ("sentencepiece:400", "byte", "", False),  # the default: the shards' own is taken, and said
        ("byte", "byte", "", False),
        ("byte", "byte", "<a>", True),
        ("byte", "sentencepiece:400", "", True),
        ("char", "char", "", False),
    ],
)
def test_a_tokenizer_that_contradicts_the_shards(
    command, corpus, tmp_path, made, asked, special, refused
):
    """`shards:` bring their tokenizer; naming another one is refused, in `prepare` and `train`."""
    prepare(config(corpus, tokenizer=made), str(tmp_path / "out"))
    data = f"source='shards:{tmp_path}/out', tokenizer='{asked}', special_tokens='{special}'"
    flag = config_flag(tmp_path, f"data=DataConfig({data})")
    code, out, err = command(prepare_command.main, flag)
    if not refused:
        assert code == 0, err
        assert ("the tokenizer is that of shards:" in err) == (made != asked)
        return
    names = rf"data\.tokenizer={asked}.* is not the tokenizer that shards:.*/out was prepared with"
    assert code == 2 and re.search(rf"error: {names} \({made.partition(':')[0]} of ", err), err
    code, _, err = command(train_command.main, flag, f"--workdir={tmp_path}/w")
    assert code == 2 and re.search(names, err) and not (tmp_path / "w/config.json").exists(), err


def test_a_mixture_keeps_its_sources_apart(corpus, tmp_path):
    source = f"3*text:{corpus}/0.txt,1*text:{corpus}/[123].txt"
    data = prepare(DataConfig(source=source, validation_fraction=0.3))
    one, two = data.train.parts
    assert (one.weight, two.weight) == (Fraction(3, 4), Fraction(1, 4))
    assert (one.first, one.end, two.end) == (0, two.first, len(data.train.tokens))
    assert (one.documents, two.documents) == (1, 2)
    assert bytes(data.train.tokens[1 : one.end].astype(np.uint8)).decode() in CORPUS
    other = prepare(DataConfig(source=source.replace("3*", "2*"), validation_fraction=0.3))
    assert other.fingerprint != data.fingerprint, "weights change the batches"


def test_tokens_are_taken_as_they_are(tmp_path):
    np.tile(np.array([256, 65, 66, 67], "<u2"), 50).tofile(tmp_path / "a.bin")
    data = prepare(DataConfig(source=f"bin:{tmp_path}/a.bin", validation_fraction=0.1))
    assert data.train.tokens[:5].tolist() == [256, 65, 66, 67, 256]
    assert (data.train.documents, data.train.bytes) == (45, 135)
    with pytest.raises(BadInput, match="data.clean cleans text"):
        prepare(DataConfig(source=f"bin:{tmp_path}/a.bin", clean="unicode"))


@pytest.fixture(scope="module")
def uncuttable(tmp_path_factory) -> Path:
    """A tokenizer.json of four words: `hf:` tokenizers are not cut, their pattern is not known."""
    folder = tmp_path_factory.mktemp("hf")
    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3}
    fast = FastTokenizer(models.WordLevel(vocab, unk_token="a"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    return folder


@pytest.mark.parametrize("kind", ["byte", "hf"])
def test_token_documents_longer_than_a_piece_are_whole(kind, uncuttable, tmp_path, monkeypatch):
    """Every token of a long document is kept, in order, whether its tokenizer may cut or not."""
    monkeypatch.setattr(formats, "TOKENS_AT_ONCE", 64)
    tokenizer = f"hf:{uncuttable}" if kind == "hf" else "byte"
    end = 0 if kind == "hf" else 256
    long = 1 + np.arange(1000) % 3
    documents = [long, [1, 2], long[:64], long[1:130]]
    np.concatenate([[end, *d] for d in documents]).astype("<u2").tofile(tmp_path / "a.bin")
    data = prepare(
        DataConfig(source=f"bin:{tmp_path}/a.bin", tokenizer=tokenizer, validation_fraction=0.05)
    )
    expected = np.concatenate([[end, *d] for d in documents[:3]])
    np.testing.assert_array_equal(data.train.tokens, expected)
    np.testing.assert_array_equal(data.validation.tokens, [end, *documents[3]])
    assert data.train.starts.tolist() == [0, 1001, 1004]


def test_whole_source_for_evaluation(corpus, tmp_path):
    split = prepare_whole(f"text:{corpus}/*.txt", DataConfig(), make_tokenizer("byte"), tmp_path)
    assert (split.documents, len(split.tokens)) == (4, split.bytes + 4)


def test_the_command_and_shards_as_a_source(command, corpus, tmp_path):
    flag = config_flag(tmp_path)
    out = tmp_path / "out"
    code, stdout, _ = command(
        prepare_command.main, flag, f"--out={out}", f"--config.data.source=text:{corpus}/*.txt"
    )
    found = json.loads(stdout.splitlines()[-1])
    assert code == 0 and list(found) == [
        "documents",
        "tokens",
        "bytes",
        "dropped",
        "vocab_size",
        "cache",
    ]
    size = sum(p.stat().st_size for p in corpus.iterdir())
    assert found == dict(
        documents=4, tokens=size + 4, bytes=size, dropped={}, vocab_size=257, cache=str(out)
    )
    again = prepare(DataConfig(source=f"shards:{out}"))
    assert len(again.train.tokens) + len(again.validation.tokens) == size + 4
    with pytest.raises(BadInput, match="holds no token shards"):
        prepare(DataConfig(source=f"shards:{tmp_path}"))


def test_jsonl_read_as_text_is_asked_about(tmp_path, capsys):
    """Once, and not of what says its kind."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two, which is longer"}\n' * 9)
    prepare(DataConfig(source=f"text:{tmp_path}/a.jsonl"))
    asked = f"did you mean jsonl:{tmp_path}/a.jsonl?"
    assert capsys.readouterr().err.count(asked) == 1
    prepare(DataConfig(source=f"jsonl:{tmp_path}/a.jsonl"))
    assert "did you mean" not in capsys.readouterr().err
