"""Classification and question answering recast as text: a prompt, and the answer to learn.

sentiment   {"text", "label"}                       labels: words, or 0 negative, 1 positive
entailment  {"premise", "hypothesis", "label"}      words, or 0 entailment, 1 neutral,
                                                    2 contradiction (SNLI, MNLI)
questions   {"context", "question", "answers"}      SQuAD's answers, a list, or one text
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.text.chat import check_spans
from jaxgpt.text.formats import json_rows
from jaxgpt.text.pieces import Piece, Span

LABELS = {
    "sentiment": ("negative", "positive"),
    "entailment": ("entailment", "neutral", "contradiction"),
}


class Example(NamedTuple):
    """One row: the prompt, and the answers that count as right (the first is the target)."""

    prompt: str
    answers: tuple[str, ...]
    where: str = ""
    row: int = 0


def _sentiment(row: dict) -> tuple[str, tuple[str, ...]]:
    return f"Review: {_text(row, 'text')}\nSentiment:", (_label(row, "sentiment"),)


def _entailment(row: dict) -> tuple[str, tuple[str, ...]]:
    premise, hypothesis = _text(row, "premise"), _text(row, "hypothesis")
    prompt = f"Premise: {premise}\nHypothesis: {hypothesis}\nRelation:"
    return prompt, (_label(row, "entailment"),)


def _questions(row: dict) -> tuple[str, tuple[str, ...]]:
    answers = row["answers"]
    answers = answers["text"] if isinstance(answers, dict) else answers
    answers = [answers] if isinstance(answers, str) else answers
    if not answers or not all(isinstance(a, str) and a for a in answers):
        raise ValueError("answers must be texts, at least one")
    context, question = _text(row, "context"), _text(row, "question")
    return f"Context: {context}\nQuestion: {question}\nAnswer:", tuple(answers)


TASKS: dict[str, Callable[[dict], tuple[str, tuple[str, ...]]]] = {
    "sentiment": _sentiment,
    "entailment": _entailment,
    "questions": _questions,
}


def _text(row: dict, field: str) -> str:
    if not isinstance(row[field], str):
        raise ValueError(f"{field} must be text")
    return row[field]


def _label(row: dict, task: str) -> str:
    label = row["label"]
    if type(label) is int and 0 <= label < len(LABELS[task]):
        return LABELS[task][label]
    if not isinstance(label, str) or not label:
        raise ValueError(f"label {label!r} is neither a word nor one of 0..{len(LABELS[task]) - 1}")
    return label


def read_examples(task: str, files: list[str]) -> Iterator[Example]:
    """Yields the examples of files of JSON. Raises `BadInput`, naming file and row, if one lacks a
    field or holds no valid label."""
    for where, number, row in json_rows(files):
        try:
            prompt, answers = TASKS[task](row)
        except (KeyError, TypeError, ValueError) as e:
            raise BadInput(f"{where} is no row of task {task}: {e!r}") from e
        for text in (prompt, *answers):
            check_text(text, where)
        yield Example(prompt, answers, where, number)


def read_task(file: str, task: str) -> Iterator[Piece]:
    """Yields a document per example, of which the answer is the target."""
    for prompt, answers, where, number in read_examples(task, [file]):
        spans = (Span(prompt), Span(f" {answers[0]}", is_target=True))
        yield Piece(check_spans(spans, where), file, number, spans=spans)
