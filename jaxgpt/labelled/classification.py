"""Classes: of a text or a pair of texts, and of the words of a sentence."""

import numpy as np

from jaxgpt.config.schema import IGNORE
from jaxgpt.labelled.examples import Arrays, Example, RowChunks, RowTask
from jaxgpt.labelled.labels import label_text
from jaxgpt.labelled.rows import Row, field_of, text_of
from jaxgpt.labelled.store import RowSplit
from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer.roles import framed


class Classification(RowTask):
    """`labels` [n] are the classes of texts that are framed as the family wants it."""

    name = "classification"
    dtypes = {"text": "<i4", "pair": "<i4", "label": "<i4"}
    labels_in = "label"

    def check(self) -> None:
        """Raises `BadInput` if the model cannot learn it or a field is unusable."""
        super().check()
        if self.kind == "decoder" and self.cfg.pooling == "first":
            raise BadInput(
                f"{self.flag('pooling')}=first on a decoder: its first token sees nothing of the"
                " text; choose last or mean"
            )

    @property
    def pooling(self) -> str:
        """Which state stands for the text: `auto` resolved."""
        chosen = self.cfg.pooling
        auto = "first" if self.kind == "encoder" else "last"
        return auto if chosen == "auto" else chosen

    @property
    def reads_pairs(self) -> bool:
        """Whether a row has two texts."""
        return bool(self.cfg.pair_field)

    def fields_of(self, prompt: str) -> dict:
        """Returns the fields that a text, or two with a tab in between, stand for."""
        text, tab, pair = prompt.partition("\t") if self.cfg.pair_field else (prompt, "\t", "")
        if not tab:
            raise BadInput("the prompt must be two texts with a tab in between")
        pairs = {self.cfg.pair_field: pair} if self.cfg.pair_field else {}
        return {self.cfg.text_field: text, self.cfg.label_field: self.names[0]} | pairs

    def parse(self, row: Row) -> Example:
        """Returns the row's text or texts, and label."""
        fields = [name for name in ("text_field", "pair_field") if getattr(self.cfg, name)]
        texts = [text_of(row, getattr(self.cfg, name), self.flag(name)) for name in fields]
        name = self.cfg.label_field
        label = label_text(field_of(row, name, self.flag("label_field")), row, name)
        return Example(tuple(texts), (label,), target=label)

    def encode(self, example: Example, ids: list[np.ndarray], labels: list[int]) -> Arrays:
        """Returns the tokens of the texts, and the label."""
        pair = ids[1] if len(ids) > 1 else ids[0][:0]
        return {"text": ids[0], "pair": pair, "label": np.array(labels)}

    def texts(self, split: RowSplit, row: int) -> list[np.ndarray]:
        """Returns the tokens of a row's text or texts."""
        names = ("text", "pair") if self.cfg.pair_field else ("text",)
        return [split.arrays[name][row] for name in names]

    def read(self, chunks: RowChunks, which: np.ndarray) -> Arrays:
        """Returns the model's arrays and `labels`."""
        split, rows = chunks.split, chunks.rows[which].tolist()
        pairs = [(*self.texts(split, row), None)[:2] for row in rows]
        arrays = self.layout([self.framed(*pair, self.room) for pair in pairs])
        labels = np.array([split.arrays["label"][row][0] for row in rows], np.int64)
        return arrays | {"labels": chunks.label_ids[labels].astype(np.int32)}

    def batch_arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns the arrays' shapes and dtypes."""
        return self.layout_arrays() | {"labels": ((), np.dtype("int32"))}

    def cut(self, split: RowSplit) -> dict[str, int]:
        """Returns how many texts are too long."""
        names = ("text", "pair") if self.cfg.pair_field else ("text",)
        lengths = self.framed_lengths(*(split.arrays[name].lengths for name in names))
        return {"texts": int(np.count_nonzero(lengths > self.room))}


class TokenClassification(RowTask):
    """`targets` [n, T] are the classes of words at their first token, IGNORE at all others."""

    name = "token_classification"
    dtypes = {"text": "<i4", "labels": "<i4"}
    labels_in = "labels"

    def fields_of(self, prompt: str) -> dict:
        """Returns the fields that words with spaces in between stand for."""
        words = prompt.split()
        labels = [self.names[0]] * len(words)
        return {self.cfg.words_field: words, self.cfg.labels_field: labels}

    def parse(self, row: Row) -> Example:
        """Returns the row's words, each but the first behind a space, and their labels."""
        words = self._list(row, "words_field")
        labels = self._list(row, "labels_field")
        if len(words) != len(labels):
            raise BadInput(f"{row.where} has {len(words)} words and {len(labels)} labels")
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise BadInput(f"{row.where}: the words must be texts, none empty, and at least one")
        texts = [check_text(" " * (i > 0) + w.strip(), row.where) for i, w in enumerate(words)]
        names = [label_text(label, row, self.cfg.labels_field) for label in labels]
        return Example(tuple(texts), tuple(names), target="".join(names))

    def _list(self, row: Row, field: str) -> list:
        name = getattr(self.cfg, field)
        value = field_of(row, name, self.flag(field))
        if isinstance(value, str):  # in a table of text
            value = value.split()
        if not isinstance(value, list):
            raise BadInput(f"{row.where}: field {name!r} is no list, but {value!r:.80}")
        return value

    def encode(self, example: Example, ids: list[np.ndarray], labels: list[int]) -> Arrays:
        """Returns the tokens of all words, and at each word's first token its label."""
        marks = [np.full(len(word), IGNORE) for word in ids]
        for mark, label in zip(marks, labels, strict=True):
            mark[:1] = label
        return {"text": np.concatenate(ids), "labels": np.concatenate(marks)}

    def read(self, chunks: RowChunks, which: np.ndarray) -> Arrays:
        """Returns the model's arrays and `targets`."""
        split = chunks.split
        special, before = len(framed(self.tokenizer, [])[0]), _before_text(self.tokenizer)
        before += self.kind == "encoder_decoder"  # its decoder's start token
        texts, targets = [], []
        for row in chunks.rows[which].tolist():
            texts.append(self.framed(split.arrays["text"][row], None, self.room))
            stored = split.arrays["labels"][row][: len(texts[-1][0]) - special]
            marks = np.where(stored == IGNORE, IGNORE, chunks.label_ids[stored])
            targets.append([IGNORE] * before + marks.tolist())
        return self.layout(texts, targets=targets)

    def batch_arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns the arrays' shapes and dtypes."""
        return self.layout_arrays("targets")

    def num_targets(self, chunks: RowChunks, which: np.ndarray) -> int:
        """Returns how many words of some rows have a label that is not cut."""
        return int(np.count_nonzero(self.read(chunks, which)["targets"] != IGNORE))

    def cut(self, split: RowSplit) -> dict[str, int]:
        """Returns how many texts are too long."""
        lengths = self.framed_lengths(split.arrays["text"].lengths)
        return {"texts": int(np.count_nonzero(lengths > self.room))}


def _before_text(tokenizer) -> int:
    """Returns how many special tokens stand in front of a framed text."""
    return framed(tokenizer, [-1])[0].index(-1)
