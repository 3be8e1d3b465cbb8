"""`metrics.jsonl`, `samples.jsonl` and TensorBoard: each step once, in order, over any resume."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from jaxgpt.config import BadInput
from jaxgpt.config.files import write_whole
from jaxgpt.config.stores import is_object_store
from jaxgpt.metrics.board import Board

NOT_PLOTTED = {"step", "split", "seconds"}


class RowFile:
    """An append-only JSON-lines file whose rows carry `step`, flushed row by row.

    Opening it after a restore cuts away, atomically, the rows after `last_step` and any half
    line that a kill left behind. Object stores know no appending: there the rows wait for `sync`,
    which writes the whole file.
    """

    def __init__(self, path, last_step: int):
        self.path = epath.Path(path)
        text = self.path.read_text() if self.path.exists() else ""
        kept = "".join(line for line in text.splitlines(keepends=True) if _keeps(line, last_step))
        if kept != text:
            write_whole(self.path, kept)
        self.file = None if is_object_store(path) else self.path.open("a")
        self.text, self.synced = kept, True

    def write(self, row: dict) -> None:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        if self.file:
            self.file.write(line)
            self.file.flush()
        else:
            self.text, self.synced = self.text + line, False

    def sync(self) -> None:
        """Writes what waits to be written."""
        if not self.synced:
            self.path.write_text(self.text)
            self.synced = True

    def close(self) -> None:
        self.sync()
        if self.file:
            self.file.close()


def _keeps(line: str, last_step: int) -> bool:
    return line.endswith("\n") and json.loads(line)["step"] <= last_step


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
            self.rows = RowFile(self.workdir / "metrics.jsonl", last_step)
            self.sampled = RowFile(self.workdir / "samples.jsonl", last_step)
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
