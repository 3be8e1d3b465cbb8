"""Names of the hub's repositories, in the strings of a config and of the command line.

    openai-community/gpt2             a model: `init_from`, `convert import --from`
    hf:openai-community/gpt2          its tokenizer: `data.tokenizer` (gpt2: too)
    hf:ORG/NAME[/CONFIG][#SPLIT]      a dataset: `data.source`, also in a mixture, and `sft:hf:...`

`@REVISION` at the end is a branch, a tag or a commit. A local folder of the same name wins.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PART, REVISION = r"\w[\w.-]*", r"(?:@(?P<revision>[\w./-]+))?"
MODEL = re.compile(rf"(?P<repo>{PART}/{PART}){REVISION}")
DATASET = re.compile(
    rf"(?P<repo>{PART}(?:/{PART})?)(?:/(?P<config>[^@#,/\s]+))?(?:#(?P<split>{PART}))?{REVISION}"
)
MODELS = ("init_from", "objectives.distill.teacher")
FIELDS = (*MODELS, "data.tokenizer", "data.source", "data.validation_source")
COMMIT = re.compile("[0-9a-f]{40}")


class Name(NamedTuple):
    """A repository at a revision ("" = the newest); of a dataset, a configuration and a split."""

    repo: str
    config: str = ""
    split: str = ""
    revision: str = ""

    def __str__(self) -> str:
        parts = zip(("", "/", "#", "@"), self, strict=True)
        return "".join(mark + part for mark, part in parts if part)

    @property
    def is_pinned(self) -> bool:
        """Says whether it names one commit, whose files never change."""
        return COMMIT.fullmatch(self.revision) is not None

    def at(self, revision: str) -> "Name":
        """Returns the same at another revision."""
        return self._replace(revision=revision)


def model_name(path: str) -> Name | None:
    """Returns the model that `path` names on the hub, None if it is a local path: there is such a
    folder, or one to hold it, which a misspelt `runs/NAME` has."""
    match = MODEL.fullmatch(path)
    if not match or Path(match["repo"]).parent.exists():
        return None
    return _name(match)


def dataset_name(argument: str) -> Name | None:
    """Returns the dataset that what follows `hf:` names, None if it can be none."""
    match = DATASET.fullmatch(argument)
    return _name(match) if match else None


def map_names(field: str, text: str, change: Callable[[Name], Name]) -> str:
    """Returns a config field's `text` with every name of the hub in it changed by `change`."""
    if not isinstance(text, str):
        return text  # `validate` refuses it
    if field in MODELS:
        name = model_name(text)
        return str(change(name)) if name else text
    if field == "data.tokenizer":
        kind, _, path = text.partition(":")
        name = model_name(path) if kind in ("hf", "gpt2") else None
        return f"{kind}:{change(name)}" if name else text

    def changed(match: re.Match) -> str:
        name = dataset_name(match[2])
        return match[1] + (str(change(name)) if name else match[2])

    return re.sub(r"((?:^|[*:])hf:)([^,]*[^,\s])", changed, text)


def names_in(field: str, text: str) -> list[Name]:
    """Returns the names of the hub in a config field's `text`."""
    found = []
    map_names(field, text, lambda name: found.append(name) or name)
    return found


def _name(match: re.Match) -> Name:
    fields = {name: value or "" for name, value in match.groupdict().items()}
    return Name(**fields)
