"""Documents to token files: read, tokenize on all cores and write, at the same time."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np

from jaxgpt.data.shards import SplitWriter, token_dtype
from jaxgpt.metrics.progress import Bar
from jaxgpt.text.pieces import Documents, Piece, in_pieces, num_bytes, whole
from jaxgpt.tokenizer import Tokenizer

BATCH_CHARS = 4 << 20  # of text in one batch; three batches exist at a time
BATCH_PIECES = 4096


def write_split(
    folder: Path,
    name: str,
    parts: list[tuple[str, Fraction, Documents]],
    tokenizer: Tokenizer,
    files: dict[str, int],
    bar: Bar,
) -> tuple[dict, dict]:
    """Writes a split of (source, weight, documents) parts; returns its meta entry and checksums.

    `files` collects the names of the documents' files.
    """
    writer = SplitWriter(folder, name, token_dtype(tokenizer.vocab_size), files)
    for source, weight, documents in parts:
        writer.begin_part(source, weight)
        for piece, ids in tokenized(documents(), tokenizer):
            if not piece.continues:
                writer.begin_document(piece.file, piece.row, tokenizer.end_of_text)
            text = piece.text if piece.tokens is None else tokenizer.decode(piece.tokens)
            size = num_bytes(text)
            writer.extend(ids, size)
            bar.advance(size)
    return writer.close()


def tokenized(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, np.ndarray]]:
    """Yields each piece with its ids; a batch is tokenized while the next is read."""
    previous = None
    with ThreadPoolExecutor(1) as ahead:
        for batch in _batches(_cut(pieces, tokenizer)):
            coming = batch, ahead.submit(_encode, batch, tokenizer)
            if previous:
                yield from zip(previous[0], previous[1].result(), strict=True)
            previous = coming
        if previous:
            yield from zip(previous[0], previous[1].result(), strict=True)


def _encode(batch: list[Piece], tokenizer: Tokenizer) -> list[np.ndarray]:
    if batch[0].tokens is not None:
        return [piece.tokens for piece in batch]
    return tokenizer.encode_batch([piece.text for piece in batch])


def _cut(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Cuts long documents where that changes no token; joins pieces if no place is known to."""
    if not tokenizer.cuttable:
        yield from whole(pieces)
        return
    for piece in pieces:
        for number, part in enumerate(in_pieces([piece.text], piece.file) if piece.text else [piece]):
            continues = piece.continues or number > 0
            yield piece._replace(text=part.text, continues=continues)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) if piece.tokens is None else 4 * len(piece.tokens)
        if size >= BATCH_CHARS or len(batch) == BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
