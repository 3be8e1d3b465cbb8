"""Sequence to sequence: an encoder reads the source, a decoder learns the target."""

import numpy as np

from jaxgpt.config.schema import IGNORE
from jaxgpt.labelled.examples import Arrays, Example, RowChunks, RowTask, decoder_arrays, padded
from jaxgpt.labelled.rows import Row, text_of
from jaxgpt.labelled.store import RowSplit
from jaxgpt.tokenizer.roles import framed


class Seq2Seq(RowTask):
    """`sources` are the framed source; with a target of a, b whose family ends it by E and starts
    its decoder by S, `inputs` are S a b and `targets` a b E. A target that is cut has no E."""

    name = "seq2seq"
    dtypes = {"source": "<i4", "target": "<i4", "reference": "u1"}

    def fields_of(self, prompt: str) -> dict:
        """Returns the fields that a source stands for."""
        return {self.cfg.source_field: prompt, self.cfg.target_field: ""}

    def parse(self, row: Row) -> Example:
        """Returns the row's source, with the prompt in front, and target."""
        source = text_of(row, self.cfg.source_field, self.flag("source_field"))
        target = text_of(row, self.cfg.target_field, self.flag("target_field"))
        return Example((self.cfg.prompt + source, target), target=target)

    def encode(self, example: Example, ids: list[np.ndarray], labels: list[int]) -> Arrays:
        """Returns the tokens of both, and the target's UTF-8."""
        reference = np.frombuffer(example.target.encode(), np.uint8)
        return {"source": ids[0], "target": ids[1], "reference": reference}

    def sources(self, split: RowSplit, rows: np.ndarray) -> list[list[int]]:
        """Returns the framed sources of some rows."""
        return [self.framed(split.arrays["source"][r], None, self.length)[0] for r in rows.tolist()]

    def read(self, chunks: RowChunks, which: np.ndarray) -> Arrays:
        """Returns the encoder's and the decoder's arrays."""
        split, rows = chunks.split, chunks.rows[which]
        length, sources = self.config.model.max_seq_len, self.sources(split, rows)
        stored = [split.arrays["target"][row].tolist() for row in rows.tolist()]
        targets = [framed(self.tokenizer, target)[0][:length] for target in stored]
        segments = [[1] * len(source) for source in sources]
        return decoder_arrays([[self.start, *target[:-1]] for target in targets], length) | {
            "targets": padded(targets, length, IGNORE),
            "sources": padded(sources, self.length, 0),
            "source_segments": padded(segments, self.length, 0),
        }

    def batch_arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns the arrays' shapes and dtypes."""
        return self.layout_arrays("targets")

    def num_targets(self, chunks: RowChunks, which: np.ndarray) -> int:
        """Returns how many tokens the targets of some rows have, by their lengths alone."""
        lengths = chunks.split.arrays["target"].lengths_of(chunks.rows[which])
        return int(np.minimum(self.framed_lengths(lengths), self.config.model.max_seq_len).sum())

    def target_bytes(self, split: RowSplit, rows: np.ndarray) -> int:
        """Returns the bytes of the rows' targets; of one that is cut, of what is left of it."""
        special = len(framed(self.tokenizer, [])[0])
        room, sizes = self.config.model.max_seq_len, split.arrays["reference"].lengths_of(rows)
        lengths = split.arrays["target"].lengths_of(rows) + special
        before = framed(self.tokenizer, [-1])[0].index(-1)
        for i in np.flatnonzero(lengths > room):
            kept = split.arrays["target"][int(rows[i])][: room - before]
            sizes[i] = len(self.tokenizer.decode(kept).encode())
        return int(sizes.sum())

    def cut(self, split: RowSplit) -> dict[str, int]:
        """Returns how many sources and targets are too long."""
        counts = {}
        for name, length in (("source", self.length), ("target", self.config.model.max_seq_len)):
            lengths = self.framed_lengths(split.arrays[name].lengths)
            counts[f"{name}s"] = int(np.count_nonzero(lengths > length))
        return counts
