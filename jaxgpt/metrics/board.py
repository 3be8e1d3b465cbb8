"""TensorBoard's event files, written in the training thread: where the disk is full, it says so.

tensorboardX's own writer leaves that to a thread of its own that dies of it, and then waits for
that thread; and it names files by the second, so that a quick restart overwrites the one before.
"""

import time

from etils import epath
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

FLUSH_EVERY = 10.0  # seconds


class Board:
    """One event file more in `folder`. What older files hold after `last_step` no longer counts.

    Files are read in the order of their names, whose numbers grow even if the clock goes back.
    """

    def __init__(self, folder, last_step: int):
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        older = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
        number = max([int(time.time()), *[int(name) + 1 for name in older if name.isdigit()]])
        self.file = RecordWriter(str(folder / f"events.out.tfevents.{number:010}.jaxgpt"))
        self.flushed = time.monotonic()
        self._add(file_version="brain.Event:2")
        self._add(step=last_step + 1, session_log=SessionLog(status="START"))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Adds a point of a curve."""
        self._add(step=step, summary=summary.scalar(tag, value))

    def text(self, tag: str, text: str, step: int) -> None:
        """Adds a text, shown as Markdown."""
        self._add(step=step, summary=summary.text(tag, text))

    def _add(self, **fields) -> None:
        self.file.write(Event(wall_time=time.time(), **fields).SerializeToString())
        if time.monotonic() > self.flushed + FLUSH_EVERY:
            self.file.flush()
            self.flushed = time.monotonic()

    def close(self) -> None:
        self.file.flush()
        self.file.close()
