"""Whole documents into windows: a plan made once, stored beside the tokens.

A document of n tokens (its end-of-text in front included) fills n places: the last one's target is
the end-of-text behind it. Longer ones than a window are cut into windows; the rest, and all others,
go by best-fit decreasing (arXiv:2404.10830): the longest first, each into the fullest window that
still has room.

With T = 6 and documents of 4, 9 and 2 tokens: [9's first 6], [4's 4, 2's 2], [9's last 3, 3 of
padding].
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.data.shards import META, ChecksummedFile, Split, cached, verify
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import read_json

PLAN = {"first": "<i8", "starts": "<i8", "lengths": "<i4"}


class Plan(NamedTuple):
    """Window w holds pieces first[w] .. first[w+1] - 1; piece p is `lengths[p]` tokens from
    token `starts[p]` on."""

    first: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def make_plan(starts: np.ndarray, end: int, seq_len: int) -> Plan:
    """Returns the plan for documents at the ascending `starts`, the last of which ends at `end`."""
    sizes = np.diff(np.append(starts, end)).astype(np.int64)
    full = sizes // seq_len
    whole_starts = np.repeat(starts, full) + seq_len * count_up(full)
    rest = sizes % seq_len
    rest_starts = starts + full * seq_len
    order = np.argsort(-rest, kind="stable")
    order = order[rest[order] > 0]
    window_of = _best_fit(rest[order].tolist(), seq_len)
    by_window = np.argsort(window_of, kind="stable")
    counts = np.bincount(window_of, minlength=0)
    picked = order[by_window]
    return Plan(
        np.concatenate([[0], np.cumsum(np.concatenate([np.ones(len(whole_starts), int), counts]))]),
        np.concatenate([whole_starts, rest_starts[picked]]).astype(np.int64),
        np.concatenate([np.full(len(whole_starts), seq_len), rest[picked]]).astype(np.int32),
    )


def _best_fit(sizes: list[int], room: int) -> np.ndarray:
    """Returns each size's window; `sizes` descend. Bit r of `open_` = some window has r free."""
    free: list[list[int]] = [[] for _ in range(room + 1)]
    open_, windows, chosen = 0, 0, np.empty(len(sizes), np.int64)
    for i, size in enumerate(sizes):
        fitting = open_ >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            window = free[left].pop()
            if not free[left]:
                open_ &= ~(1 << left)
        else:
            left, window, windows = room, windows, windows + 1
        chosen[i] = window
        free[left - size].append(window)
        if left > size:
            open_ |= 1 << (left - size)
    return chosen


def count_up(counts: np.ndarray) -> np.ndarray:
    """Returns 0..c-1 for each c: [2, 3] gives [0, 1, 0, 1, 2]."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def plan_for(split: Split, part: int, seq_len: int, locks: Path) -> Plan:
    """Returns the plan of one part of a split, made and stored on first use.

    Raises:
      BadInput: if it cannot be written beside the tokens.
    """
    folder = split.folder / f"pack-{seq_len}" / f"{split.name}.{part}"
    return cached(folder, locks, _writer(split, part, seq_len), _read_plan)


def _read_plan(folder: Path) -> Plan:
    schema = {name: {"bytes": int, "crc32": [int]} for name in PLAN}
    checksums = read_json(folder / META, schema)
    verify(folder, {name: checksums[name] for name in PLAN})
    return Plan(*(np.memmap(folder / name, dtype, "r") for name, dtype in PLAN.items()))


def _writer(split: Split, part: int, seq_len: int) -> Callable[[Path], None]:
    def write(scratch: Path) -> None:
        found = split.parts[part]
        first, end = np.searchsorted(split.starts, (found.first, found.end))
        starts = np.asarray(split.starts[first:end]).astype(np.int64)
        if not len(starts):
            raise BadInput("there is no document to pack")
        plan, checksums = make_plan(starts, found.end, seq_len), {}
        for (name, dtype), values in zip(PLAN.items(), plan, strict=True):
            file = ChecksummedFile(scratch / name)
            file.write(values.astype(dtype).tobytes())
            checksums[name] = file.close()
        (scratch / META).write_text(json.dumps(checksums))

    return write
