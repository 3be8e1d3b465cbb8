"""Questions whose answer is a stretch of a context, or that have none (SQuAD 1.1 and 2.0).

A context that does not fit is read in windows that overlap by half. In the windows without the
whole answer the right span is the first token, which also stands for "no answer"
(arXiv:1810.04805, section 4.3). The span of a question is the likeliest of all windows.
"""

import dataclasses

import numpy as np

from jaxgpt.data.packing import count_up
from jaxgpt.labelled.examples import Arrays, Example, RowChunks, RowTask, padded
from jaxgpt.labelled.rows import Row, field_of, text_of
from jaxgpt.labelled.store import RowSplit
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer.roles import framed

LONGEST_QUESTION = 2  # a question takes at most this part of the context: one half


class SpanQa(RowTask):
    """`spans` [n, 2] are the first and last token of the answer, `context` [n, T] is 1 at the
    tokens that may be one of them."""

    name = "span_qa"
    dtypes = {"question": "<i4", "context": "<i4", "offsets": "<i4", "answers": "<i4", "text": "u1"}

    @property
    def reads_pairs(self) -> bool:
        """Whether a row has two texts: a question and its context."""
        return True

    def fields_of(self, prompt: str) -> dict:
        """Returns the fields that a question and a context with a tab in between stand for."""
        question, tab, context = prompt.partition("\t")
        if not tab:
            raise BadInput("the prompt must be a question and a context with a tab in between")
        fields = {self.cfg.question_field: question, self.cfg.context_field: context}
        return fields | {self.cfg.answers_field: []}

    def parse(self, row: Row) -> Example:
        """Returns the row's question and context, and where in it the answers are."""
        question = text_of(row, self.cfg.question_field, self.flag("question_field"))
        context = text_of(row, self.cfg.context_field, self.flag("context_field"))
        value = field_of(row, self.cfg.answers_field, self.flag("answers_field"))
        answers = tuple(_answer(context, *pair, row) for pair in _pairs(value, row))
        first = context[slice(*answers[0])] if answers else ""
        return Example((question, context), answers=answers, target=first)

    def encode(self, example: Example, ids: list[np.ndarray], labels: list[int]) -> Arrays:
        """Returns the tokens of both, the (start, end) characters of the context's tokens and of
        the answers, and the context's UTF-8."""
        context = example.texts[1]
        return {
            "question": ids[0],
            "context": ids[1],
            "offsets": self.tokenizer.offsets(context, ids[1]).ravel(),
            "answers": np.array(example.answers, np.int32).ravel(),
            "text": np.frombuffer(context.encode(), np.uint8),
        }

    def chunks(self, split: RowSplit, first: int, end: int, label_ids) -> "WindowChunks":
        """Returns the windows of rows `first` .. `end` - 1 as chunks."""
        rows = np.arange(first, end)
        rooms, lengths = self._rooms(split, rows), split.arrays["context"].lengths_of(rows)
        steps = np.maximum(rooms // 2, 1)
        counts = 1 + np.maximum(0, -(-(lengths - rooms) // steps))
        starts = np.repeat(steps, counts) * count_up(counts)
        return WindowChunks(self, split, np.repeat(rows, counts), label_ids, starts)

    def _question(self, split: RowSplit, row: int) -> np.ndarray:
        return split.arrays["question"][row][: self.room // LONGEST_QUESTION]

    def _rooms(self, split: RowSplit, rows: np.ndarray) -> np.ndarray:
        """Returns how many tokens of the context fit beside each row's question."""
        special = len(framed(self.tokenizer, [], [])[0])
        questions = split.arrays["question"].lengths_of(rows)
        rooms = self.room - special - np.minimum(questions, self.room // LONGEST_QUESTION)
        if (rooms < 1).any():
            raise BadInput(f"{self.room} tokens (model.max_seq_len) have no room for a context")
        return rooms

    def read(self, chunks: "WindowChunks", which: np.ndarray) -> Arrays:
        """Returns the arrays of some windows, [n, ...]."""
        split, rows, texts, spans, allowed = chunks.split, chunks.rows[which], [], [], []
        windows = np.stack([rows, chunks.starts[which], self._rooms(split, rows)], axis=1)
        for row, start, room in windows.tolist():
            question = self._question(split, row).tolist()
            context = split.arrays["context"][row][start : start + room].tolist()
            texts.append(framed(self.tokenizer, question, context))
            before = self.before_context(len(question))
            spans.append(self._span(split, row, start, len(context), before))
            allowed.append([1] + [0] * (before - 1) + [1] * len(context))
        return self.layout(texts) | {
            "spans": np.array(spans, np.int32).reshape(-1, 2),
            "context": padded(allowed, self.config.model.max_seq_len, 0),
        }

    def before_context(self, question: int) -> int:
        """Returns how many tokens stand in front of a context behind so many of a question."""
        before = framed(self.tokenizer, [0] * question, [-1])[0].index(-1)
        return before + (self.kind == "encoder_decoder")  # its start token

    def _span(self, split: RowSplit, row: int, start: int, count: int, before: int):
        """Returns the first answer's tokens in a window; (0, 0) if it is not in there whole."""
        answers = split.arrays["answers"][row]
        if not len(answers):
            return 0, 0
        offsets = split.arrays["offsets"][row].reshape(-1, 2)
        first = int(np.searchsorted(offsets[:, 1], answers[0], side="right"))
        last = int(np.searchsorted(offsets[:, 0], answers[1], side="left")) - 1
        if not start <= first <= last < start + count:
            return 0, 0
        return first - start + before, last - start + before

    def batch_arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns the arrays' shapes and dtypes."""
        context = self.layout_arrays("context")
        return context | {"spans": ((2,), np.dtype("int32"))}

    def cut(self, split: RowSplit) -> dict[str, int]:
        """Returns how many questions are too long."""
        lengths = split.arrays["question"].lengths
        return {"questions": int(np.count_nonzero(lengths > self.room // LONGEST_QUESTION))}

    def references(self, split: RowSplit, row: int) -> list[str]:
        """Returns the texts of a row's answers."""
        context = self.context(split, row)
        answers = split.arrays["answers"][row].reshape(-1, 2).tolist()
        return [context[start:end] for start, end in answers]

    def context(self, split: RowSplit, row: int) -> str:
        """Returns the text of a row's context."""
        return split.arrays["text"][row].tobytes().decode()

    def answer(self, split: RowSplit, row: int, start: int, span: tuple[int, int]) -> str:
        """Returns the text of a span of tokens in a window, "" for the first token's."""
        if span == (0, 0):
            return ""
        before = self.before_context(len(self._question(split, row)))
        offsets = split.arrays["offsets"][row].reshape(-1, 2)
        first, last = (token - before + start for token in span)
        return self.context(split, row)[offsets[first, 0] : offsets[last, 1]]


@dataclasses.dataclass(frozen=True)
class WindowChunks(RowChunks):
    """Chunks of which each is a window of a row's context."""

    starts: np.ndarray


def best_span(start: np.ndarray, end: np.ndarray) -> tuple[float, tuple[int, int]]:
    """Returns the highest sum of a start and an end that does not precede it, and both; of the
    values [n] those that may not be one are -inf."""
    highest = np.maximum.accumulate(end[::-1])[::-1]
    first = int(np.argmax(start + highest))
    last = first + int(np.argmax(end[first:]))
    return float(start[first] + end[last]), (first, last)


def _pairs(value: object, row: Row) -> list[tuple[str, int | None]]:
    """Returns the (text, start or None) of answers in any of the usual forms: SQuAD's {"text":
    [...], "answer_start": [...]} or [{"text", "answer_start"}], a text, a list of texts; none of
    null, "" and []."""
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, list) and starts is None:
            starts = [None] * len(texts)
        if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
            raise BadInput(f"{row.where}: answers need lists text and answer_start of one length")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list):
        pairs = [
            (a.get("text"), a.get("answer_start")) if isinstance(a, dict) else (a, None)
            for a in value
        ]
    else:
        pairs = [(value, None)] if value else []
    for text, start in pairs:
        if not isinstance(text, str) or not text or not (start is None or type(start) is int):
            raise BadInput(f"{row.where}: {(text, start)!r:.80} is no answer: a text and its start")
    return pairs


def _answer(context: str, text: str, start: int | None, row: Row) -> tuple[int, int]:
    """Returns from which to which character of the context an answer reaches."""
    at = context.find(text) if start is None else start
    if at < 0 or context[at : at + len(text)] != text:
        there = "nowhere" if start is None else f"not at character {start}"
        raise BadInput(f"{row.where}: the answer {text!r:.60} is {there} of the context")
    return at, at + len(text)
