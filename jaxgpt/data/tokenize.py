"""Documents to token files: read, tokenize on all cores and write, at the same time."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import numpy as np

from jaxgpt.data.shards import SplitWriter, token_dtype
from jaxgpt.metrics.progress import Bar
from jaxgpt.text.pieces import Documents, Piece, Span, join_pieces, num_bytes, split_into_pieces
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
    masked: bool = False,
) -> tuple[dict, dict]:
    """Writes a split of (source, weight, documents) parts; returns its meta entry and checksums.

    `files` collects the names of the documents' files. `masked`: not all of the text is learnt.
    """
    writer = SplitWriter(folder, name, token_dtype(tokenizer.vocab_size), files, masked)
    for source, weight, documents in parts:
        writer.begin_part(source, weight)
        for piece, (ids, learn) in tokenized(documents(), tokenizer):
            if not piece.continues:
                writer.begin_document(piece.file, piece.row, tokenizer.end_of_text)
            text = piece.text if piece.tokens is None else tokenizer.decode(piece.tokens)
            size = num_bytes(text)
            learnt = sum(num_bytes(part.text) for part in piece.spans if part.is_target)
            writer.extend(ids, size, learn, learnt)
            bar.advance(size)
    return writer.close()


def tokenized(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, tuple]]:
    """Yields each piece with (ids, which of them are learnt; None = all).

    A batch is tokenized while the next is read.
    """
    previous = None
    with ThreadPoolExecutor(1) as ahead:
        for batch in _batches(_cut(pieces, tokenizer)):
            coming = batch, ahead.submit(_encode, batch, tokenizer)
            if previous:
                yield from zip(previous[0], previous[1].result(), strict=True)
            previous = coming
        if previous:
            yield from zip(previous[0], previous[1].result(), strict=True)


def _encode(batch: list[Piece], tokenizer: Tokenizer) -> list[tuple]:
    if batch[0].tokens is not None:
        return [(piece.tokens, None) for piece in batch]
    texts = [
        part.text
        for piece in batch
        for part in piece.spans or (Span(piece.text),)
        if not part.special
    ]
    encoded = iter(tokenizer.encode_batch(texts))
    return [_in_parts(p, encoded, tokenizer) if p.spans else (next(encoded), None) for p in batch]


def _in_parts(piece: Piece, encoded: Iterator[np.ndarray], tokenizer: Tokenizer) -> tuple:
    """Parts are tokenized one by one, so that none of them changes another's tokens."""
    ids = [
        np.array([tokenizer.special[part.text]]) if part.special else next(encoded)
        for part in piece.spans
    ]
    learn = [np.full(len(i), part.is_target) for i, part in zip(ids, piece.spans, strict=True)]
    return np.concatenate(ids).astype(np.int32), np.concatenate(learn)


def _cut(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Cuts long documents where that changes no token; joins pieces if no place is known to.

    What is tokenized already stays in its pieces, whatever the tokenizer.
    """
    if not tokenizer.cuttable:
        for tokenized, run in groupby(pieces, lambda piece: piece.tokens is not None):
            read = iter if tokenized else join_pieces
            yield from read(run)
        return
    for piece in pieces:
        if not piece.text or piece.spans:
            yield piece
            continue
        for number, part in enumerate(split_into_pieces([piece.text], piece.file)):
            yield piece._replace(text=part.text, continues=piece.continues or number > 0)


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
