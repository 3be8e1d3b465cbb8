"""A batch as people read it: where each window's text comes from, and what is learnt from it."""

from collections.abc import Iterator

import numpy as np

from jaxgpt.config.schema import IGNORE
from jaxgpt.data.pipeline import Stream
from jaxgpt.data.prepare import Prepared
from jaxgpt.system.errors import BadInput


def show_batch(stream: Stream, data: Prepared, k: int) -> Iterator[str]:
    """Yields lines that describe batch `k`, which trains step k + 1: for each window its source,
    documents (with the tokens taken of each), text, and which positions the loss counts.

    Raises:
      BadInput: if k is negative.
    """
    if k < 0:
        raise BadInput(f"--show={k}: batches count from 0 (batch k trains step k + 1)")
    batch = {name: a.reshape(-1, a.shape[-1]) for name, a in stream.batch(k).items()}
    rows, length = batch["inputs"].shape
    yield (
        f"batch {k} (step {k + 1}): {rows} windows of {length} tokens,"
        f" {stream.num_targets(k):,} targets"
    )
    places = stream.places(k).ravel()
    for row, (source, window) in enumerate(zip(*stream.windows(places), strict=True)):
        part = data.train.parts[source]
        count = len(stream.sources[source])
        yield f"\n=== window {row}: number {window} of {count} of {part.source}"
        at = 0
        for number, (start, size) in enumerate(stream.sources[source].spans(int(window)), start=1):
            start += 0 if "segments" in batch else part.first
            segment = f"segment {number}, " if "segments" in batch else ""
            yield f"--- {segment}positions {at}-{at + size - 1}: {_documents(data, start, size)}"
            yield data.tokenizer.decode(batch["inputs"][row, at : at + size])
            at += size
        yield f"--- loss on {_ranges(batch['targets'][row] != IGNORE)} of {length}" + (
            f", {length - at} of padding" if at < length else ""
        )


def _documents(data: Prepared, start: int, size: int) -> str:
    """Names the documents that tokens start .. start + size - 1 belong to."""
    first, _ = data.train.origin(start)
    last, _ = data.train.origin(start + size - 1)
    names = []
    for number in range(first, last + 1):
        begin = int(data.train.starts[number])
        _, name = data.train.origin(begin)
        names.append(f"{name} (from its token {max(start - begin, 0)})")
    return ", ".join(names)


def _ranges(mask: np.ndarray) -> str:
    """Returns `0-5,9-9` for the places where `mask` is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    pairs = edges.reshape(-1, 2)
    return ",".join(f"{a}-{b - 1}" for a, b in pairs) or "nothing"
