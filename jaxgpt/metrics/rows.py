"""`metrics.jsonl`, `samples.jsonl` and TensorBoard: each step once and in order."""

import contextlib
import json
import os
from collections.abc import Iterator

import numpy as np
from etils import epath

from jaxgpt.metrics.board import Board
from jaxgpt.metrics.trackers import Trackers
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import parse_json, write_whole
from jaxgpt.system.stores import is_object_store, read_bytes

NOT_PLOTTED = {"step", "split", "seconds"}
ROW = {"step": int}
METRICS = ROW | {
    "split": str,
    "loss": float | None,
    "seconds": float,
    "learning_rate?": float,
    "grad_norm?": float | None,
    "tokens?": int,
    "tokens_per_second?": float,
    "step_seconds?": float,
    "mfu?": float | None,
    "perplexity?": float | None,
    "bits_per_byte?": float | None,
}
SAMPLES = ROW | {"prompt": str, "text": str}
EVALUATIONS = "evaluations.jsonl"  # see jaxgpt.evaluation.results


def named_numbers(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns each scalar by its name, and each number of a vector as `name/0`, `name/1`, ..."""
    found = {}
    for name, value in metrics.items():
        each = enumerate(np.ravel(value).tolist())
        found |= {f"{name}/{i}" if np.ndim(value) else name: number for i, number in each}
    return {name: float(number) for name, number in found.items()}


def read_rows(path, schema: dict) -> list[dict]:
    """Returns the rows of a JSON-lines file that fit `schema`, [] if there is no file.

    An incomplete last line, which a kill leaves behind, is ignored. Other lines that are not rows
    are skipped, with one message about the first.
    """
    lines, fault = _read_lines(path, schema)
    if fault:
        say(f"damaged   {fault}; skipped")
    return [row for _, row in lines]


def _read_lines(path, schema: dict) -> tuple[list[tuple[bytes, dict]], str]:
    """Returns each row's line and value, and what is wrong with the first line that is not a row.

    Only a line feed ends a line, not U+2028 and the like, at which `str.splitlines` also splits.
    """
    path, rows, faults = epath.Path(path), [], []
    lines = read_bytes(path).split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append((line + b"\n", parse_json(line, schema)))
        except ValueError as e:
            faults.append(f"line {number} of {path}: {e}")
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return rows, faults[0] + more if faults else ""


class RowFile:
    """An append-only JSON-lines file whose rows have a `step`, flushed row by row.

    Opening it removes, atomically, the rows after `last_step` and an incomplete last line. Other
    lines that are not rows are removed too, after a copy of the file is made beside it. Object
    stores cannot append: there `sync` writes the whole file.

    Raises:
      BadInput: on writing, if the file was moved or deleted, as later rows would be lost.
    """

    def __init__(self, path, last_step: int, schema: dict = ROW):
        self.path = epath.Path(path)
        lines, fault = _read_lines(path, schema)
        if fault:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            aside.write_bytes(read_bytes(path))
            say(f"damaged   {fault}; removed, with a copy of the file in {aside}")
        kept = b"".join(line for line, row in lines if row["step"] <= last_step)
        if self.path.exists() and kept != read_bytes(path):
            write_whole(self.path, kept.decode())
        self.file = None if is_object_store(path) else self.path.open("ab")
        if not self.file and not self.path.exists():
            self.path.write_text("")  # if it is missing later, it was deleted
        self.text, self.synced = kept.decode(), True

    def write(self, row: dict) -> None:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        if self.file:
            self.file.write(line.encode())
            self.file.flush()
            self._check_file()
        else:
            self.text, self.synced = self.text + line, False

    def sync(self) -> None:
        """Writes the rows that are not on an object store yet."""
        if self.file or not self.synced:
            self._check_file()
        if not self.synced:
            self.path.write_text(self.text)
            self.synced = True

    def close(self) -> None:
        self.sync()
        if self.file:
            self.file.close()

    def _check_file(self) -> None:
        is_there = self.path.exists()
        if is_there and self.file:
            is_there = os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        if not is_there:
            raise BadInput(
                f"{self.path} was moved or deleted while the run was writing to it; put the workdir"
                " back, or choose another --workdir, and run the same command again"
            )


class Reporter:
    """Writes a run's rows to disk, TensorBoard and `trackers`; does nothing on processes other than
    the first.

    Every method raises `BadInput` if the disk is full or not writable.
    """

    def __init__(self, workdir, last_step: int, is_first_process: bool, trackers=None):
        self.active, self.workdir = is_first_process, epath.Path(workdir)
        self.trackers = trackers or Trackers()
        self._open(last_step)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise BadInput(
                f"{self.workdir / name} cannot be written: {e}; make room, then run the same"
                " command again to resume"
            ) from e

    def _open(self, last_step: int) -> None:
        if not self.active:
            return
        with self._writing("metrics.jsonl"):
            self.rows = RowFile(self.workdir / "metrics.jsonl", last_step, METRICS)
            self.samples = RowFile(self.workdir / "samples.jsonl", last_step, SAMPLES)
            if (self.workdir / EVALUATIONS).exists():
                RowFile(self.workdir / EVALUATIONS, last_step).close()
            appends = not is_object_store(self.workdir)
            self.board = Board(self.workdir / "tensorboard", last_step, appends)

    def metrics(self, row: dict) -> None:
        """Writes a row of `metrics.jsonl`; numbers also become TensorBoard scalars."""
        if not self.active:
            return
        with self._writing("metrics.jsonl"):
            self.rows.write(row)
            numbers = {
                name: float(value)
                for name, value in row.items()
                if name not in NOT_PLOTTED and value is not None
            }
            for name, value in numbers.items():
                self.board.scalar(f"{row['split']}/{name}", value, row["step"])
        self.trackers.metrics(row["split"], row["step"], numbers)

    def sample(self, row: dict) -> None:
        """Writes a row of `samples.jsonl`: step, prompt, text."""
        if not self.active:
            return
        with self._writing("samples.jsonl"):
            self.samples.write(row)
            self.board.text("sample", f"```\n{row['prompt']}{row['text']}\n```", row["step"])
        self.trackers.sample(row["step"], row["prompt"] + row["text"])

    def sync(self) -> None:
        """Makes all rows so far durable; called before each checkpoint is saved."""
        if self.active:
            with self._writing("metrics.jsonl"):
                self.rows.sync()
                self.samples.sync()
                self.board.flush()

    def rewind(self, last_step: int) -> None:
        """Removes what was written after `last_step`, from where training continues."""
        self.close()
        self._open(last_step)

    def close(self) -> None:
        if self.active:
            with self._writing("metrics.jsonl"):
                for file in (self.rows, self.samples, self.board):
                    file.close()
