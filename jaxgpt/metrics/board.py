"""TensorBoard's event files, written in the training thread, so that a full disk is an error there.

The `tensorboard` package's own EventFileWriter writes in a thread that dies of it unnoticed, and
names files by the second, so that a quick restart overwrites the file before.
"""

import io
import time

from etils import epath
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

FLUSH_EVERY = 10.0  # seconds


class Board:
    """A new event file in `folder`, which overrides what older files say after `last_step`.

    TensorBoard reads files in the order of their names, whose numbers grow even if the clock is set
    back. Without `appends`, as on object stores, `flush` writes the whole file.
    """

    def __init__(self, folder, last_step: int, appends: bool = True):
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        older = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
        number = max([int(time.time()), *[int(name) + 1 for name in older if name.isdigit()]])
        self.path = folder / f"events.out.tfevents.{number:010}.jaxgpt"
        self.appends = appends
        self.file = self.path.open("wb") if self.appends else io.BytesIO()
        self.records = RecordWriter(self.file)
        self.flushed = time.monotonic()
        self._add(file_version="brain.Event:2")
        self._add(step=last_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Adds a point to the curve `tag`."""
        self._add(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

    def text(self, tag: str, text: str, step: int) -> None:
        """Adds a text that is shown as Markdown."""
        self._add(step=step, summary=text_pb(tag, text))

    def _add(self, **fields) -> None:
        self.records.write(Event(wall_time=time.time(), **fields).SerializeToString())
        if self.appends and time.monotonic() > self.flushed + FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Makes all events so far visible to readers."""
        if self.appends:
            self.file.flush()
        else:
            self.path.write_bytes(self.file.getvalue())
        self.flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        self.file.close()
