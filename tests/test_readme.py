"""What the README, the launch scripts and the docstrings name: it exists, and is understood."""

import dataclasses
import re

import pytest

from jaxgpt.config import Config, DataConfig
from jaxgpt.system.errors import BadInput
from jaxgpt.text import sources
from tests.conftest import ROOT

TEXTS = [
    ROOT / "README.md",
    *(ROOT / "launch").iterdir(),
    *(ROOT / "configs").glob("*.py"),
    *(ROOT / "jaxgpt").glob("*.py"),
]
VALUE = r"('[^']*'|[^\s'`]+(?:'[^']*')?)"  # as a shell takes it: 'text:a b/*', text:'DIR/*.txt'


def named(pattern: str) -> list:
    """Every match of `pattern` in the texts, with the file's name."""
    return [
        pytest.param(found, id=f"{file.name}-{found}")
        for file in TEXTS
        for found in sorted(set(re.findall(pattern, file.read_text())))
    ]


@pytest.mark.parametrize("path", named(r"\b(?:configs|launch|tests)/[\w./]+\.\w+"))
def test_files_exist(path):
    assert (ROOT / path).is_file()


def test_the_readme_lists_every_config_and_launch_script():
    text = (ROOT / "README.md").read_text()
    tables = {
        name
        for row in re.findall(r"^\| (`.*?) \|", text, re.M)
        for name in re.findall(r"`([\w.]+)", row)
    }
    assert tables >= {file.stem for file in (ROOT / "configs").glob("*.py")}
    whole = {file.name for file in (ROOT / "launch").iterdir()}
    assert not {name for name in whole if name not in text}


@pytest.mark.parametrize(
    "source",
    named(rf"--(?:config\.data\.(?:validation_)?source|data|against)=(?!SOURCE|shards:|{{){VALUE}"),
)
def test_sources_are_understood(source, monkeypatch, tmp_path):
    """All but whether their files are there."""
    monkeypatch.setattr(sources, "list_files", lambda source, pattern, remedy: [])
    assert sources.open_sources(source.replace("'", ""), DataConfig(), tmp_path)


def test_a_source_without_its_kind_is_not_understood(tmp_path):
    with pytest.raises(BadInput, match="is unknown"):
        sources.open_sources("gs://bucket/*.jsonl", DataConfig(), tmp_path)


@pytest.mark.parametrize("field", named(r"--config\.([a-z]\w*(?:\.\w+)*)="))
def test_flags_name_fields(field):
    at = Config()
    for name in field.split("."):
        assert name in {f.name for f in dataclasses.fields(at)}
        at = getattr(at, name)
