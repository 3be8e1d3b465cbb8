"""Documents to token files: read, tokenize on all cores and write, at the same time."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from pathlib import Path

import numpy as np

from jaxgpt.data.shards import SplitWriter, token_dtype
from jaxgpt.metrics.progress import Bar
from jaxgpt.text.pieces import Piece, Span, join_pieces, num_bytes, split_into_pieces
from jaxgpt.text.sources import Source
from jaxgpt.tokenizer import Tokenizer

BATCH_CHARS = 4 << 20  # of text in one batch; three batches exist at a time
BATCH_PIECES = 4096


def write_splits(
    folder: Path, splits: dict[str, list[Source]], tokenizer: Tokenizer
) -> tuple[dict, list[str]]:
    """Writes the documents of each split's sources; returns the splits' entries in meta.json and
    the names of the documents' files."""
    entries, files = {}, {}
    total = sum(source.num_bytes for sources in splits.values() for source in sources)
    with Bar("data      tokenizing", total) as bar:
        for name, sources in splits.items():
            masked = any(source.masked for source in sources)
            writer = SplitWriter(folder, name, token_dtype(tokenizer.vocab_size), files, masked)
            for source in sources:
                writer.begin_part(source.spec, source.weight)
                for piece, ids, is_target in tokenize(source.documents(), tokenizer):
                    if not piece.continues:
                        writer.begin_document(piece.file, piece.row, tokenizer.end_of_text)
                    text = piece.text if piece.tokens is None else tokenizer.decode(piece.tokens)
                    target_bytes = sum(num_bytes(s.text) for s in piece.spans if s.is_target)
                    writer.extend(ids, num_bytes(text), is_target, target_bytes)
                    bar.advance(num_bytes(text))
            entries[name] = writer.close()
    return entries, list(files)


def tokenize(
    pieces: Iterable[Piece], tokenizer: Tokenizer
) -> Iterator[tuple[Piece, np.ndarray, np.ndarray | None]]:
    """Yields (piece, ids, which of them are targets; None = all).

    A batch is tokenized while the next is read.
    """
    with ThreadPoolExecutor(1) as executor:
        running = None
        for batch in _batches(_cut(pieces, tokenizer)):
            previous, running = running, executor.submit(_encode, batch, tokenizer)
            if previous:
                yield from previous.result()
        if running:
            yield from running.result()


def _encode(batch: list[Piece], tokenizer: Tokenizer) -> list[tuple]:
    """Each span is tokenized by itself, so that none of them changes another's tokens."""
    if batch[0].tokens is not None:
        return [(piece, piece.tokens, None) for piece in batch]
    spans = [piece.spans or (Span(piece.text),) for piece in batch]
    encoded = iter(tokenizer.encode_batch([s.text for s in chain(*spans) if not s.special]))
    result = []
    for piece, own in zip(batch, spans, strict=True):
        ids = [[tokenizer.special[s.text]] if s.special else next(encoded) for s in own]
        is_target = np.repeat([s.is_target for s in own], [len(i) for i in ids])
        all_ids = np.concatenate(ids).astype(np.int32)
        result.append((piece, all_ids, is_target if piece.spans else None))
    return result


def _cut(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Cuts long documents where that changes no token; joins them again if the tokenizer does not
    say where that is. Tokens of `bin:` files stay in their pieces."""
    if not tokenizer.cuttable:
        for is_tokenized, run in groupby(pieces, lambda piece: piece.tokens is not None):
            read = iter if is_tokenized else join_pieces
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
        size += piece.length if piece.tokens is None else 4 * piece.length
        if size >= BATCH_CHARS or len(batch) == BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
