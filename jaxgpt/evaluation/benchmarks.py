"""Reads benchmarks whose answers are chosen by likelihood from their own jsonl files.

    hellaswag  {"ctx_a", "ctx_b", "activity_label", "endings",       arXiv:1905.07830
               "label"}
    arc        {"question", "choices", "answerKey"}, AI2's files     arXiv:1803.05457
               or Hugging Face's
    lambada    {"text"}: its last word                               arXiv:1606.06031

Prompts and choices are those of EleutherAI's evaluation harness.
"""

import re
from typing import NamedTuple

from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.text.formats import json_rows


class Item(NamedTuple):
    """A prompt, its possible continuations, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    right: int


def _hellaswag(row: dict) -> Item:
    context = f"{_text(row['ctx_a'])} {_text(row['ctx_b']).capitalize()}"
    prompt = _plain(f"{_text(row['activity_label'])}: {context}")
    return Item(prompt, tuple(f" {_plain(end)}" for end in row["endings"]), int(row["label"]))


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]} is not text")
    return value


def _plain(text: str) -> str:
    """Returns WikiHow's text without its markup, `[title]`, `[step]` and so on."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _arc(row: dict) -> Item:
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    prompt = f"Question: {_text(question)}\nAnswer:"
    return Item(prompt, tuple(f" {_text(text)}" for text in texts), labels.index(row["answerKey"]))


def _lambada(row: dict) -> Item:
    prompt, word = row["text"].rsplit(" ", 1)
    return Item(prompt, (f" {word}",), 0)


BENCHMARKS = {"hellaswag": _hellaswag, "arc": _arc, "lambada": _lambada}


def read_items(name: str, files: list[str]) -> list[Item]:
    """Returns the items of a benchmark's files. Raises `BadInput`, naming file and row, if a row
    is not of that benchmark."""
    items = []
    for where, _, row in json_rows(files):
        try:
            item = BENCHMARKS[name](row)
            if not 0 <= item.right < len(item.choices) or not all(item.choices):
                raise ValueError(f"choice {item.right} is not there")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise BadInput(f"{where} is no row of {name}: {e!r}") from e
        check_text("".join([item.prompt, *item.choices]), where)
        items.append(item)
    return items
