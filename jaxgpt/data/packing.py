"""Whole documents into chunks: a plan made once, stored beside the tokens.

A document of n tokens (its end-of-text in front included) fills n positions: the target of the last
is the end-of-text that follows. Documents longer than a chunk fill whole chunks first; their rests
and all other documents are placed by best-fit decreasing (arXiv:2404.10830): the longest first,
each into the fullest chunk that still has room.

With T = 6 and documents of 4, 9 and 2 tokens: [9's first 6], [4's 4, 2's 2], [9's last 3, 3 of
padding].
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.data.cache import load_or_write
from jaxgpt.data.shards import META, Split, checksums_of, verify_checksums
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import read_json

PLAN = {"first": "<i8", "starts": "<i8", "lengths": "<i4"}


class Plan(NamedTuple):
    """Chunk c holds segments first[c] .. first[c+1] - 1; segment s is `lengths[s]` tokens from
    token `starts[s]` on."""

    first: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def make_plan(starts: np.ndarray, end: int, seq_len: int) -> Plan:
    """Returns the plan for documents at the ascending `starts`, the last of which ends at `end`."""
    sizes = np.diff(np.append(starts, end)).astype(np.int64)
    full = sizes // seq_len
    full_starts = np.repeat(starts, full) + seq_len * count_up(full)
    rest = sizes % seq_len
    order = np.argsort(-rest, kind="stable")
    order = order[rest[order] > 0]
    chunk_of = _best_fit(rest[order].tolist(), seq_len)
    by_chunk = order[np.argsort(chunk_of, kind="stable")]
    counts = np.concatenate([[0], np.ones(len(full_starts), int), np.bincount(chunk_of)])
    rest_starts = (starts + full * seq_len)[by_chunk]
    return Plan(
        np.cumsum(counts),
        np.concatenate([full_starts, rest_starts]).astype(np.int64),
        np.concatenate([np.full(len(full_starts), seq_len), rest[by_chunk]]).astype(np.int32),
    )


def _best_fit(sizes: list[int], room: int) -> np.ndarray:
    """Returns each size's chunk; `sizes` descend."""
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # chunks by their free positions
    bits = 0  # bit r is set if with_room[r] is not empty
    num_chunks, chunk_of = 0, np.empty(len(sizes), np.int64)
    for i, size in enumerate(sizes):
        if fitting := bits >> size:
            free = size + (fitting & -fitting).bit_length() - 1
            chunk = with_room[free].pop()
            if not with_room[free]:
                bits &= ~(1 << free)
        else:
            free, chunk, num_chunks = room, num_chunks, num_chunks + 1
        chunk_of[i] = chunk
        with_room[free - size].append(chunk)
        if free > size:
            bits |= 1 << (free - size)
    return chunk_of


def count_up(counts: np.ndarray) -> np.ndarray:
    """Returns 0..c-1 for each c: [2, 3] gives [0, 1, 0, 1, 2]."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def plan_for(split: Split, part: int, seq_len: int, locks: Path) -> Plan:
    """Returns the plan of one part of a split, made and stored on first use."""

    def write(scratch: Path) -> None:
        begin, end = split.parts[part].first, split.parts[part].end
        first, last = np.searchsorted(split.starts, (begin, end))
        starts = np.asarray(split.starts[first:last]).astype(np.int64)
        if not len(starts):
            raise BadInput("there is no document to pack")
        for name, values in make_plan(starts, end, seq_len)._asdict().items():
            (scratch / name).write_bytes(values.astype(PLAN[name]).tobytes())
        checksums = {name: checksums_of(scratch / name) for name in PLAN}
        (scratch / META).write_text(json.dumps(checksums))

    folder = split.folder / f"pack-{seq_len}" / f"{split.name}.{part}"
    return load_or_write(folder, locks, write, _read_plan)


def _read_plan(folder: Path) -> Plan:
    checksums = read_json(folder / META, {name: {"bytes": int, "crc32": [int]} for name in PLAN})
    verify_checksums(folder, checksums)
    return Plan(*(np.memmap(folder / name, dtype, "r") for name, dtype in PLAN.items()))
