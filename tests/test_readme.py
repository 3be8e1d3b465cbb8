"""What the README and its pages, the launch scripts and the docstrings name: it exists, and is
understood."""

import dataclasses
import re

import pytest

from jaxgpt.config import Config, DataConfig
from jaxgpt.system.errors import BadInput
from jaxgpt.text import sources
from tests.conftest import ROOT

README = ROOT / "README.md"
PAGES = [ROOT / room / "README.md" for room in ("configs", "jaxgpt", "launch", "tests")]
PAGES += (ROOT / "jaxgpt").glob("*/README.md")
TEXTS = [
    README,
    *PAGES,
    *(file for file in (ROOT / "launch").iterdir() if file not in PAGES),
    *(ROOT / "configs").glob("*.py"),
    *(ROOT / "jaxgpt").glob("*.py"),
]
VALUE = r"('[^']*'|[^\s'`]+(?:'[^']*')?)"  # as a shell takes it: 'text:a b/*', text:'DIR/*.txt'


def named(pattern: str) -> list:
    """Every match of `pattern` in the texts, with the file's name."""
    return [
        pytest.param(found, id=f"{file.relative_to(ROOT)}-{found}")
        for file in TEXTS
        for found in sorted(set(re.findall(pattern, file.read_text())))
    ]


@pytest.mark.parametrize("path", named(r"\b(?:configs|launch|tests)/[\w./]+\.\w+"))
def test_files_exist(path):
    assert (ROOT / path).is_file()


def anchors(page) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def test_links_lead_somewhere_and_every_page_is_linked():
    linked = set()
    for page in (README, *PAGES):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{link} in {page}"
            assert not anchor or anchor in anchors(target), f"{link} in {page}"
            if page == README:
                linked.add(target)
    assert linked == set(PAGES)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 220


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_flags_exist(page):
    source = "".join(file.read_text() for file in (ROOT / "jaxgpt").rglob("*.py"))
    known = set(re.findall(r'DEFINE(?:_\w+)?\(\s*(?:\w+\(\), )?"(\w+)"', source)) | {"config"}
    for line in re.findall(r"^.*\bjaxgpt[. ][a-z]\w+.* --.*$", page.read_text(), re.M):
        for name in re.findall(r"(?:python -m jaxgpt\.|(?<!\S)jaxgpt )([a-z]\w+)", line):
            assert (ROOT / "jaxgpt" / f"{name}.py").is_file(), line
        for command in re.findall(r"python -m jaxgpt\.[^`;&#]*", line):
            assert set(re.findall(r"--(\w+)", command)) <= known, command


def test_the_readme_lists_every_config_and_launch_script():
    text = "".join(page.read_text() for page in (README, *PAGES))
    tables = {
        name
        for row in re.findall(r"^\| (`.*?) \|", text, re.M)
        for name in re.findall(r"`([\w.]+)", row)
    }
    assert tables >= {file.stem for file in (ROOT / "configs").glob("*.py")}
    whole = {file.name for file in (ROOT / "launch").iterdir() if file.suffix != ".md"}
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
