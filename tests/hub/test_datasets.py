"""Datasets by their name on the hub: which files are which split, and without a network."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from jaxgpt import prepare as prepare_command
from jaxgpt.config import DataConfig
from jaxgpt.data.prepare import prepare
from jaxgpt.hub.datasets import dataset_files, find_splits, read_configs
from jaxgpt.hub.names import dataset_name
from jaxgpt.system.errors import BadInput
from tests.hub.conftest import forget

TEXTS = [f"document {i}: the cat sat on the mat, été {i * i}" for i in range(40)]
CARD = """---
license: mit
configs:
- config_name: de
  data_files:
  - split: train
    path: "de/part-*.parquet"
  - split: dev
    path: ["de/held-out.parquet"]
- config_name: en
  default: true
  data_files: [{split: train, path: "en/**/*.parquet"}, {split: validation, path: "en/[hv]*-out.*"}]
---
# Words
"""

CARD_EN = CARD.replace('  - split: dev\n    path: ["de/held-out.parquet"]\n', "")


def write_parquet(path, texts=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or {"text": texts}
    pyarrow.parquet.write_table(pa.table(columns), path)


@pytest.fixture
def texts(hub, tmp_path):
    """A repository of parquet in two training files and one for validation; returns its commit."""
    folder = tmp_path / "texts"
    write_parquet(folder / "data/train-00000-of-00002.parquet", TEXTS[:20])
    write_parquet(folder / "data/train-00001-of-00002.parquet", TEXTS[20:32])
    write_parquet(folder / "data/validation-00000-of-00001.parquet", TEXTS[32:36])
    write_parquet(folder / "data/test-00000-of-00001.parquet", TEXTS[36:])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "load.py").write_text("raise SystemExit('no code of a repository is run')")
    return hub.commit("datasets", "tests/texts", folder)


def text_of(split) -> str:
    return "".join("|" if t == 256 else chr(t) for t in split.tokens)


def test_train_and_validation_are_the_dataset_s(hub, texts, tmp_path, capsys):
    data = prepare(DataConfig(source="hf:tests/texts"))
    folder = tmp_path / "texts/data"
    alike = prepare(
        DataConfig(
            source=f"parquet:{folder}/train*", validation_source=f"parquet:{folder}/validation*"
        )
    )
    assert data.fingerprint == alike.fingerprint
    assert text_of(data.validation).count("document") == 4
    assert len(hub.downloads()) == 4 and not any(f.endswith(".py") for f in hub.downloads())
    assert f"hub       dataset tests/texts@{texts}: 2 + 1 files" in capsys.readouterr().err
    test = prepare(DataConfig(source="hf:tests/texts#test", validation_fraction=0.5))
    assert (text_of(test.train) + text_of(test.validation)).count("document") == 4
    mixed = prepare(DataConfig(source="0.5*hf:tests/texts,0.5*hf:tests/texts#test"))
    assert len(mixed.train.parts) == 2


def test_chats_of_parquet_are_those_of_lines(hub, tmp_path):
    turns = [[{"from": "human", "value": t}, {"from": "gpt", "value": t[:10]}] for t in TEXTS]
    write_parquet(tmp_path / "chats/rows.parquet", conversations=turns, id=list(range(40)))
    lines = "\n".join(json.dumps({"conversations": chat}) for chat in turns)
    (tmp_path / "rows.jsonl").write_text(lines)
    hub.commit("datasets", "tests/chats", tmp_path / "chats")
    sources = ("sft:hf:tests/chats", f"sft:{tmp_path}/chats/*.parquet", "sft:rows.jsonl")
    one, *others = (prepare(DataConfig(source=source)) for source in sources)
    assert one.train.num_targets > 0
    assert {other.fingerprint for other in others} == {one.fingerprint}
    turns[3][1]["from"] = "robot"
    write_parquet(tmp_path / "chats/rows.parquet", conversations=turns)
    with pytest.raises(BadInput, match="rows.parquet, row 4: from 'robot' is unknown"):
        prepare(DataConfig(source=f"sft:{tmp_path}/chats/*.parquet"))


@pytest.mark.parametrize(
    "name, files, train, validation",
    [
        ("a/b", "train.jsonl dev.jsonl README.md", "train.jsonl", "dev.jsonl"),
        ("a/b", "x.json dataset_infos.json .cache/y.json _z.json", "x.json", ""),
        ("a/b", "a.txt.gz b.txt requirements.txt LICENSE.txt", "a.txt.gz b.txt", ""),
        ("a/b", "train/0.parquet valid/0.parquet train.csv", "train/0.parquet", "valid/0.parquet"),
        ("a/b", "wiki_val.parquet training.parquet", "training.parquet", "wiki_val.parquet"),
        ("a/b", "data.parquet trainer.parquet", "data.parquet trainer.parquet", ""),
        ("a/b", "x.jsonl x.parquet", "x.parquet", ""),
        ("a/b/en", "en/x.parquet de/x.parquet", "en/x.parquet", ""),
        ("a/b", "default/train/0000.parquet", "default/train/0000.parquet", ""),
        (
            "a/b",
            "default/partial-train/0000.parquet big/train/0000.parquet",
            "default/partial-train/0000.parquet",
            "",
        ),
    ],
)
def test_splits_by_the_names_of_files(name, files, train, validation):
    splits = find_splits(dataset_name(name), files.split(), [])
    assert splits["train"] == train.split() and splits.get("validation", []) == validation.split()


@pytest.mark.parity
def test_splits_are_those_of_the_datasets_library(tmp_path, monkeypatch):
    """From a local folder, whose README.md and names it resolves as those of a repository."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for i, (files, card) in enumerate(
        (
            ("data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet", ""),
            ("train.jsonl dev.jsonl test.jsonl", ""),
            ("train/a.parquet valid/b.parquet", ""),
            ("my_train.parquet my-validation.parquet", ""),
            ("a.parquet b.parquet", ""),
            ("training/x.parquet testing/y.parquet", ""),
            ("en/a/b/x.parquet en/y.parquet en/held-out.parquet de/part-1.parquet", CARD_EN),
        )
    ):
        folder = tmp_path / f"set/{i}"
        for file in files.split():
            if file.endswith("jsonl"):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(json.dumps({"text": file}))
            else:
                write_parquet(folder / file, [file])
        (folder / "README.md").write_text(card)
        theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
        train, validation = dataset_files(f"set/{i}", tmp_path)
        for split, ours in (("train", train), ("validation", validation)):
            rows = theirs[split]["text"] if split in theirs else []
            assert sorted(file.removeprefix(f"set/{i}/") for file in ours) == sorted(rows), files


def test_splits_by_the_readme(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    configs = read_configs(tmp_path / "README.md")
    files = "de/part-0.parquet de/part-1.parquet de/held-out.parquet en/a/b/x.parquet".split()
    files += "en/y.parquet en/held-out.parquet other.parquet".split()
    assert find_splits(dataset_name("a/b/de"), files, configs) == {
        "train": files[:2],
        "dev": files[2:3],
    }
    assert find_splits(dataset_name("a/b"), files, configs) == {
        "train": files[3:6],
        "validation": files[5:6],
    }
    one = [{"config_name": "x", "data_files": "en/*.parquet"}]
    assert find_splits(dataset_name("a/b"), files, one) == {"train": files[4:6]}
    one = [{"config_name": "x", "data_dir": "de"}]
    assert find_splits(dataset_name("a/b"), files, one) == {"train": files[:3]}


@pytest.mark.parametrize(
    "name, card, message",
    [
        ("a/b/fr", CARD, "a/b/fr has no configuration fr: de, en; name one, for example hf:a/b/de"),
        ("a/b", CARD.replace("default", "x"), "a/b has several configurations: de, en; name one"),
        ("a/b#dev", CARD, r"a/b#dev has no split dev; .*hf:a/b#train \(it has train"),
        ("a/b", "---\nconfigs: {}x\n---\n", "README.md cannot be read: ParserError"),
        ("a/b", "---\nconfigs: [3]\n---\n", "README.md cannot be read: TypeError"),
        ("a/b", "---\nconfigs:\n- {config_name: x, data_files: [3]}\n---\n", "not understood"),
        ("a/b/x", "", "a/b/x has no configuration x"),
    ],
)
def test_a_dataset_that_is_not_understood_says_what_it_has(
    tmp_path, monkeypatch, name, card, message
):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "a/b/en/x.parquet", ["x"])
    (tmp_path / "a/b/README.md").write_text(card)
    forget()
    with pytest.raises(BadInput, match=message):
        dataset_files(name, tmp_path)


def test_other_formats_are_read_from_the_hub_s_copy(hub, tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/train.csv").write_text("text\nno")
    hub.commit("datasets", "tests/csv", tmp_path / "csv")
    with pytest.raises(BadInput, match="no parquet, JSON or text files, .*; it has train.csv"):
        dataset_files("tests/csv", tmp_path)
    forget()
    write_parquet(tmp_path / "copy/default/train/0000.parquet", TEXTS)
    copy = hub.commit("datasets", "tests/csv", tmp_path / "copy", "refs/convert/parquet")
    (file,), _ = dataset_files("tests/csv", tmp_path)
    assert file.endswith(f"{copy}/default/train/0000.parquet")


def test_without_the_hub_the_same_files_or_none(hub, texts, tmp_path, monkeypatch):
    """A part of them would be other data."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="dataset tests/texts is no .* HF_HUB_OFFLINE is set"):
        dataset_files("tests/texts", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget()
    test = dataset_files("tests/texts#test", tmp_path)
    forget()
    count = len(hub.requests)
    assert dataset_files(f"tests/texts#test@{texts}", tmp_path) == test
    assert len(hub.requests) == count, "the files of a commit never change"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    assert dataset_files("tests/texts#test", tmp_path) == test
    with pytest.raises(BadInput, match="does not hold all of its files"):
        dataset_files("tests/texts", tmp_path)


def test_a_local_folder_wins(hub, texts, tmp_path):
    write_parquet(tmp_path / "tests/texts/x.parquet", TEXTS[:3])
    assert dataset_files("tests/texts", tmp_path) == (["tests/texts/x.parquet"], [])
    assert not hub.requests


def test_names_that_are_none(hub, command):
    for source, message in (
        ("hf:", "data source 'hf:' is unknown"),
        ("hf:a b", "hf:a b names no dataset of the hub: hf:ORG/NAME"),
        ("hf:tests/none", "the hub has no dataset of that name"),
        ("hf:tests/texts@v1", "has no dataset of that name"),
    ):
        flags = ("--config=tiny", f"--config.data.source={source}")
        code, _, err = command(prepare_command.main, *flags)
        assert code == 2 and message in err and err.count("\n") == 1, err
