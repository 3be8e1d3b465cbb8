"""Data as people read it: a batch, with what the loss counts of it; a prompt as an example."""

import itertools
import json
import os
import shlex
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxgpt.config.schema import IGNORE
from jaxgpt.data.pipeline import Stream
from jaxgpt.data.prepare import Prepared
from jaxgpt.data.shards import Split
from jaxgpt.system.files import read_json
from jaxgpt.text.chat import user_message
from jaxgpt.tokenizer import Tokenizer

EXAMPLE_FILE = "example.json"
SEARCHED = 64  # documents or tokens in which a prompt is looked for


def show_batch(stream: Stream, data: Prepared, k: int) -> Iterator[str]:
    """Yields lines that describe batch `k`, which trains step k + 1: for each chunk its source,
    documents (with the tokens taken of each), text, and which positions the loss counts."""
    batch = {name: a.reshape(-1, a.shape[-1]) for name, a in stream.batch(k).items()}
    rows, length = batch["inputs"].shape
    targets = f"{stream.num_targets(k):,} targets"
    yield f"batch {k} (step {k + 1}): {rows} chunks of {length} tokens, {targets}"
    sources, chunks = stream.chunks(stream.indices(k).ravel())
    chunks = chunks.reshape(rows, -1)[:, 0]  # without the numbers that corrupted rows have too
    is_packed = "positions" in batch
    for row, (source, chunk) in enumerate(zip(sources.tolist(), chunks.tolist(), strict=True)):
        part, reader = data.train.parts[source], stream.sources[source]
        yield f"\n=== row {row}: chunk {chunk} of {len(reader)} of {part.source}"
        at = 0
        for number, (start, size) in enumerate(reader.segments(chunk), start=1):
            start += 0 if is_packed else part.first
            size_here = size if is_packed else length
            segment = f"segment {number}, " if is_packed else ""
            documents = _documents(data.train, start, start + size - 1)
            yield f"--- {segment}positions {at}-{at + size_here - 1}: {documents}"
            if "sources" in batch:
                yield f"{_shown(data.tokenizer, batch['sources'][row])}\n--- and the decoder reads"
            yield _shown(data.tokenizer, batch["inputs"][row, at : at + size_here])
            at += size_here
        padding = f", {length - at} of padding" if at < length else ""
        yield f"--- loss on {_ranges(batch['targets'][row] != IGNORE)} of {length}{padding}"


def _shown(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Returns the text of `ids`, special tokens by their names."""
    names = {i: name for name, i in tokenizer.special.items()}
    parts = itertools.groupby(ids.tolist(), lambda i: names.get(i, ""))
    return "".join(tokenizer.decode(p) if not name else name * len([*p]) for name, p in parts)


def _documents(split: Split, first: int, last: int) -> str:
    """Names the documents that hold the tokens `first` .. `last`."""
    starts = split.starts[split.origin(first)[0] : split.origin(last)[0] + 1].tolist()
    return ", ".join(
        f"{split.origin(start)[1]} (from its token {max(first - start, 0)})" for start in starts
    )


def _ranges(mask: np.ndarray) -> str:
    """Returns `0-5,9-9` for the positions where `mask` is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return ",".join(f"{a}-{b - 1}" for a, b in edges.reshape(-1, 2)) or "nothing"


class Example(NamedTuple):
    """A prompt for a model that learnt such text; of a chat the user's message, which `--chat`
    puts into the run's template."""

    prompt: str
    is_chat: bool


NO_EXAMPLE = Example("", is_chat=False)


def example_prompt(split: Split, tokenizer: Tokenizer, template: str) -> Example:
    """Returns an example from one of a split's first documents: of chats the shortest message, of
    other prompts with responses the shortest prompt, else three words."""
    if split.mask is not None:
        starts = split.starts[:SEARCHED].tolist()
        ends = [start + 1 + int(np.argmax(split.mask[start + 1 :])) for start in starts]
        texts = (
            tokenizer.decode(split.tokens[start + 1 : end]) for start, end in zip(starts, ends)
        )
        prompts = list(filter(None, texts))
        if messages := list(filter(None, (user_message(text, template) for text in prompts))):
            return Example(min(messages, key=len), True)
        if prompts:
            return Example(min(prompts, key=len), False)
    lines = tokenizer.decode_stable(split.tokens[1:SEARCHED]).splitlines()
    first_words = [line.split()[:3] for line in lines]
    return Example(" ".join(max(first_words, key=len, default=[])), False)  # the first with three


def save_example(example: Example, folder: os.PathLike) -> None:
    """Writes the example beside a tokenizer, for `serve`, which has no data."""
    text = json.dumps({"prompt": example.prompt, "chat": example.is_chat})
    (epath.Path(folder) / EXAMPLE_FILE).write_text(text)


def saved_example(folder: os.PathLike) -> Example:
    """Returns the example in `folder`, an empty one if there is none. Raises `BadInput` if it is
    damaged."""
    file = epath.Path(folder) / EXAMPLE_FILE
    if not file.exists():
        return NO_EXAMPLE
    found = read_json(file, {"prompt": str, "chat": bool}, "delete it")
    return Example(found["prompt"], found["chat"])


def in_shell(text: str) -> str:
    """Returns `text` as one word of a shell's command, on one line."""
    if text.isprintable():
        return shlex.quote(text)
    escapes = {"\n": "\\n", "\t": "\\t", "\\": "\\\\", "'": "\\'"}
    letters = (escapes.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text)
    return f"$'{''.join(letters)}'"
