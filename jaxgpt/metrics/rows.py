"""`metrics.jsonl`, `samples.jsonl` and TensorBoard: each step once, in order, over any resume."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from jaxgpt.metrics.board import Board
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


def read_rows(path, schema: dict) -> list[dict]:
    """Returns the rows of a JSON-lines file that fit `schema`, [] if there is no file.

    Half a last line, which a kill leaves behind, is no row; for any other line that is none, one
    message says what is wrong with the first.
    """
    lines, fault = _read_lines(path, schema)
    if fault:
        say(f"damaged   {fault}; left out")
    return [row for _, row in lines]


def _read_lines(path, schema: dict) -> tuple[list[tuple[bytes, dict]], str]:
    """Returns each row's line and value, and what is wrong with the first line that is no row.

    Only a line feed ends a line: a text may hold U+2028 and others that Python counts as ends too.
    """
    path = epath.Path(path)
    found, faults = [], []
    lines = read_bytes(path).split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines[:-1], start=1):
        try:
            found.append((line + b"\n", parse_json(line, schema)))
        except ValueError as e:
            faults.append(f"line {number} of {path}: {e}")
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return found, faults[0] + more if faults else ""


class RowFile:
    """An append-only JSON-lines file whose rows carry `step`, flushed row by row.

    Opening it after a restore cuts away, atomically, the rows after `last_step` and any half
    line that a kill left behind. Other lines that are no rows are cut away too; the file as it was
    is kept beside then. Object stores know no appending: there the rows wait for `sync`, which
    writes the whole file.

    Raises:
      BadInput: on writing, if the file was moved or deleted meanwhile: what follows would be lost.
    """

    def __init__(self, path, last_step: int, schema: dict = ROW):
        self.path = epath.Path(path)
        lines, fault = _read_lines(path, schema)
        if fault:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            aside.write_bytes(read_bytes(path))
            say(f"damaged   {fault}; cut away, and kept in {aside}")
        kept = b"".join(line for line, row in lines if row["step"] <= last_step).decode()
        if self.path.exists() and kept.encode() != read_bytes(path):
            write_whole(self.path, kept)
        self.file = None if is_object_store(path) else self.path.open("ab")
        if not self.file and not self.path.exists():
            self.path.write_text("")  # from here on, one that is not there was deleted
        self.text, self.synced = kept, True

    def write(self, row: dict) -> None:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        if self.file:
            self.file.write(line.encode())
            self.file.flush()
            self._check_place()
        else:
            self.text, self.synced = self.text + line, False

    def sync(self) -> None:
        """Writes what waits to be written."""
        if self.file:
            self._check_place()
        elif not self.synced:
            self._check_place()
            self.path.write_text(self.text)
            self.synced = True

    def close(self) -> None:
        self.sync()
        if self.file:
            self.file.close()

    def _check_place(self) -> None:
        try:
            if self.file:
                if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path)):
                    return
            elif self.path.exists():
                return
        except FileNotFoundError:
            pass
        raise BadInput(
            f"{self.path} was moved or deleted while the run was writing to it; put the workdir"
            " back, or choose another --workdir, and run the same command again"
        )


class Reporter:
    """Writes a run's rows to disk and TensorBoard; on all processes but the first, nothing.

    Every method raises `BadInput` where the disk is full or may not be written.
    """

    def __init__(self, workdir, last_step: int, is_first_process: bool):
        self.active, self.workdir = is_first_process, epath.Path(workdir)
        self._open(last_step)

    @contextmanager
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
            self.sampled = RowFile(self.workdir / "samples.jsonl", last_step, SAMPLES)
            appends = not is_object_store(self.workdir)
            self.board = Board(self.workdir / "tensorboard", last_step, appends)

    def metrics(self, row: dict) -> None:
        """Writes a row of `metrics.jsonl`; numbers also become TensorBoard scalars."""
        if not self.active:
            return
        with self._writing("metrics.jsonl"):
            self.rows.write(row)
            for name, value in row.items():
                if name not in NOT_PLOTTED and value is not None:
                    self.board.scalar(f"{row['split']}/{name}", float(value), row["step"])

    def sample(self, row: dict) -> None:
        """Writes a row of `samples.jsonl`: step, prompt, text."""
        if not self.active:
            return
        with self._writing("samples.jsonl"):
            self.sampled.write(row)
            self.board.text("sample", f"```\n{row['prompt']}{row['text']}\n```", row["step"])

    def sync(self) -> None:
        """Makes sure of all rows so far; called in front of each checkpoint."""
        if self.active:
            with self._writing("metrics.jsonl"):
                self.rows.sync()
                self.sampled.sync()
                self.board.flush()

    def rewind(self, last_step: int) -> None:
        """Cuts away what was written after `last_step`; training goes on from there."""
        self.close()
        self._open(last_step)

    def close(self) -> None:
        if self.active:
            with self._writing("metrics.jsonl"):
                for file in (self.rows, self.sampled, self.board):
                    file.close()
