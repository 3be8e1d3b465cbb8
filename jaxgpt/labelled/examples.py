"""What every objective on labelled rows says: how a row is read, and how rows become a batch."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from jaxgpt.config import Config
from jaxgpt.config.schema import IGNORE
from jaxgpt.data.chunks import Chunks
from jaxgpt.labelled.labels import parse_labels
from jaxgpt.labelled.rows import Row
from jaxgpt.labelled.store import Ragged, RowSplit
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.roles import framed, role_id

Arrays = dict[str, np.ndarray]
Framed = tuple[list[int], list[int]]  # tokens with special ones around them, and their types


class Example(NamedTuple):
    """A row, checked: the texts to tokenize, its labels, the answers' (start, end) characters, and
    the text that is predicted."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    answers: tuple[tuple[int, int], ...] = ()
    target: str = ""


@dataclasses.dataclass(frozen=True)
class RowTask(abc.ABC):
    """An objective on rows, for a config; to make batches it needs the tokenizer too. Labels in
    batches are numbers of `names`."""

    config: Config
    tokenizer: Tokenizer | None = None

    name: ClassVar[str] = ""
    dtypes: ClassVar[dict[str, str]] = {}  # of the arrays that are stored
    labels_in: ClassVar[str] = ""  # the stored array with the numbers of labels

    @property
    def cfg(self):
        """The objective's part of the config."""
        return getattr(self.config.objectives, self.name)

    def flag(self, field: str) -> str:
        """Returns the path of a field of `cfg`."""
        return f"objectives.{self.name}.{field}"

    @property
    def kind(self) -> str:
        """The kind of the model."""
        return self.config.model.kind

    @property
    def has_types(self) -> bool:
        """Whether the model has embeddings of BERT's token types."""
        return self.config.model.type_vocab_size > 0

    @property
    def reads_pairs(self) -> bool:
        """Whether a row has two texts."""
        return False

    @property
    def length(self) -> int:
        """The most tokens of a text."""
        model = self.config.model
        if self.kind != "encoder_decoder":
            return model.max_seq_len
        return model.max_source_len or model.max_seq_len

    @property
    def room(self) -> int:
        """The most tokens of a text that an encoder-decoder's decoder reads too."""
        return min(self.length, self.config.model.max_seq_len)

    @property
    def names(self) -> list[str]:
        """The labels that the config lists; [] if it lists none."""
        text = self.cfg.labels if self.labels_in else ""
        return parse_labels(text, self.flag("labels")) if text else []

    def known_names(self) -> list[str]:
        """Returns the labels. Raises `BadInput` if the config does not list them."""
        if names := self.names:
            return names
        raise BadInput(
            f"{self.flag('labels')} is empty: name the labels, comma-separated, which nothing else"
            " says without rows"
        )

    def check(self) -> None:
        """Raises `BadInput` if a field is unusable."""
        list(self.names)  # for its errors

    @abc.abstractmethod
    def fields_of(self, prompt: str) -> dict:
        """Returns the fields of a row that a prompt stands for, without a label or an answer.
        Raises `BadInput` if it is none."""

    def split_of(self, prompt: str) -> RowSplit:
        """Returns a split of one row, which a prompt stands for; its labels are the first."""
        names = self.known_names() if self.labels_in else []
        example = self.parse(Row(self.fields_of(prompt), "", 1, "the prompt"))
        ids = self.tokenizer.encode_batch(example.texts)
        stored = self.encode(example, ids, [0] * len(example.labels))
        arrays = {
            name: Ragged(np.asarray(values, self.dtypes[name]), np.array([len(values)]))
            for name, values in stored.items()
        }
        size = sum(len(text.encode()) for text in example.texts)
        return RowSplit("prompt", arrays, np.zeros((1, 2), int), [""], 1, size, size, 0, 0, names)

    @abc.abstractmethod
    def parse(self, row: Row) -> Example:
        """Returns the row, checked. Raises `BadInput`, which names it, if it is unusable."""

    @abc.abstractmethod
    def encode(self, example: Example, ids: list[np.ndarray], labels: list[int]) -> Arrays:
        """Returns what is stored of a row, from its texts' tokens and its labels' numbers."""

    def chunks(self, split: RowSplit, first: int, end: int, label_ids: np.ndarray) -> Chunks:
        """Returns rows `first` .. `end` - 1 as chunks; `label_ids` gives the number among `names`
        of each stored label."""
        return RowChunks(self, split, np.arange(first, end), label_ids)

    @abc.abstractmethod
    def read(self, chunks: "RowChunks", which: np.ndarray) -> Arrays:
        """Returns the arrays of some chunks, [n, ...]."""

    @abc.abstractmethod
    def batch_arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns a batch's arrays by name: the shape behind [grad_accum, batch], and the dtype."""

    def num_targets(self, chunks: "RowChunks", which: np.ndarray) -> int:
        """Returns how many targets some chunks have together: one each."""
        return len(which)

    @abc.abstractmethod
    def cut(self, split: RowSplit) -> dict[str, int]:
        """Returns in how many rows what is too long and loses its end: {"texts": 3}."""

    def layout(self, framed_rows: Sequence[Framed], **more: Sequence[Sequence[int]]) -> Arrays:
        """Returns what the model reads of framed texts: a decoder or an encoder as `inputs`; an
        encoder-decoder as `sources`, and again behind the start token as the decoder's `inputs`.

        `more` are arrays by name, one value a token (padding: IGNORE); of an encoder-decoder they
        belong to the decoder's tokens.
        """
        length, kind = self.config.model.max_seq_len, self.kind
        rows = [ids for ids, _ in framed_rows]
        arrays = {}
        if kind == "encoder_decoder":
            arrays["sources"] = padded(rows, self.length, 0)
            arrays["source_segments"] = padded([[1] * len(ids) for ids in rows], self.length, 0)
            rows = [[self.start, *ids[:-1]][:length] for ids in rows]
        elif self.has_types:
            arrays["types"] = padded([types for _, types in framed_rows], length, 0)
        arrays |= decoder_arrays(rows, length)
        return arrays | {
            n: padded([v[:length] for v in a], length, IGNORE) for n, a in more.items()
        }

    def layout_arrays(self, *more: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns the shapes and dtypes of `layout`'s arrays, behind those of the batch."""
        model, wide = self.config.model, (self.length,)
        names = ["inputs", "segments", "positions", *more]
        arrays = {name: ((model.max_seq_len,), np.dtype("int32")) for name in names}
        if self.kind == "encoder_decoder":
            sources = dict.fromkeys(("sources", "source_segments"), (wide, np.dtype("int32")))
            return arrays | sources
        if self.has_types:
            arrays["types"] = arrays["inputs"]
        return arrays

    @property
    def start(self) -> int:
        """The token that a decoder reads first."""
        return role_id(self.tokenizer, f"objective={self.name}", "decoder_start")

    def framed(self, first: np.ndarray, second: np.ndarray | None, length: int) -> Framed:
        """Returns one or two texts with the family's special tokens, cut to `length` tokens: the
        longer one loses its end first."""
        parts = [first] if second is None else [first, second]
        room = length - len(framed(self.tokenizer, *[[] for _ in parts])[0])
        if room < len(parts):
            raise BadInput(f"a context of {length} tokens has no room for a text")
        parts = cut_longest(parts, room)
        return framed(self.tokenizer, *[part.tolist() for part in parts])

    def framed_lengths(self, *lengths: np.ndarray) -> np.ndarray:
        """Returns the lengths of framed texts, whole, from those of one or two texts each."""
        return sum(lengths) + len(framed(self.tokenizer, *[[] for _ in lengths])[0])


@dataclasses.dataclass(frozen=True)
class RowChunks(Chunks):
    """Chunks of which each is one row."""

    task: RowTask
    split: RowSplit
    rows: np.ndarray
    label_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def seq_len(self) -> int:
        """The length of the model's inputs."""
        return self.task.config.model.max_seq_len

    def read(self, chunks: np.ndarray) -> Arrays:
        """Returns the arrays of the chunks, [n, ...]."""
        return self.task.read(self, chunks)

    def segments(self, chunk: int) -> list[tuple[int, int]]:
        """Returns [(the row, 1)]."""
        return [(int(self.rows[chunk]), 1)]

    def num_targets(self, chunks: np.ndarray) -> int:
        """Returns how many targets the chunks have together."""
        return self.task.num_targets(self, chunks)


def cut_longest(parts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """Returns one or two arrays cut to `room` values together, the longer one first."""
    if len(parts) == 1:
        return [parts[0][:room]]
    sizes = [len(part) for part in parts]
    if sum(sizes) <= room:
        return parts
    shorter = min(*sizes, room // 2)
    kept = [shorter if size == min(sizes) else room - shorter for size in sizes]
    if sizes[0] == sizes[1]:
        kept[1] = room - kept[0]
    return [part[:size] for part, size in zip(parts, kept, strict=True)]


def padded(rows: Sequence[Sequence[int]], length: int, padding: int) -> np.ndarray:
    """Returns rows as int32 [n, length], filled up with `padding`."""
    array = np.full((len(rows), length), padding, np.int32)
    for to, values in zip(array, rows, strict=True):
        to[: len(values)] = values
    return array


def decoder_arrays(rows: Sequence[Sequence[int]], length: int) -> Arrays:
    """Returns `inputs`, `segments` (1, padding 0) and `positions` of rows of tokens."""
    return {
        "inputs": padded(rows, length, 0),
        "segments": padded([[1] * len(ids) for ids in rows], length, 0),
        "positions": padded([range(len(ids)) for ids in rows], length, 0),
    }
