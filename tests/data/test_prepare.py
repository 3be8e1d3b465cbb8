"""Token shards: what is in them, that they are cached, whole, and told apart."""

import json

import numpy as np
import pytest

from jaxgpt import prepare as prepare_command
from jaxgpt.config import BadInput, DataConfig
from jaxgpt.data import prepare as module
from jaxgpt.data.prepare import prepare, prepare_whole
from jaxgpt.data.shards import whole_or_nothing
from jaxgpt.tokenizer import make_tokenizer
from tests.conftest import CORPUS


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
        patch.setattr(module, "write_split", lambda *a: pytest.fail("should come from the cache"))
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
    with pytest.raises(RuntimeError), whole_or_nothing(out) as scratch:
        (scratch / "half").touch()
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


def test_truncated_shard_is_noticed(corpus):
    data = prepare(config(corpus))
    file = data.folder / "train.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(BadInput, match="train.bin is damaged"):
        prepare(config(corpus))


def test_whole_source_for_evaluation(corpus, tmp_path):
    split = prepare_whole(f"text:{corpus}/*.txt", "text", make_tokenizer("byte", None, 0), tmp_path)
    assert (split.documents, len(split.tokens)) == (4, split.bytes + 4)


def test_the_command_and_shards_as_a_source(command, corpus, tmp_path):
    (tmp_path / "c.py").write_text(
        "from jaxgpt.config import *\ndef get_config():\n    return Config()\n"
    )
    out = tmp_path / "out"
    code, stdout, _ = command(
        prepare_command.main, f"--config={tmp_path}/c.py", f"--out={out}",
        f"--config.data.source=text:{corpus}/*.txt",
    )  # fmt: skip
    found = json.loads(stdout.splitlines()[-1])
    assert code == 0 and list(found) == [
        "documents", "tokens", "bytes", "dropped", "vocab_size", "cache"
    ]  # fmt: skip
    size = sum(p.stat().st_size for p in corpus.iterdir())
    assert found == dict(
        documents=4, tokens=size + 4, bytes=size, dropped={}, vocab_size=257, cache=str(out)
    )
    again = prepare(DataConfig(source=f"shards:{out}"))
    assert len(again.train.tokens) + len(again.validation.tokens) == size + 4
    with pytest.raises(BadInput, match="holds no token shards"):
        prepare(DataConfig(source=f"shards:{tmp_path}"))
