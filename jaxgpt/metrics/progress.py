"""Progress as people read it: the lines of training, and a bar."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from jaxgpt.system.console import say

INTERVAL = 5.0  # seconds between two lines


def duration(seconds: float) -> str:
    """Returns `4.2s`, `3m05s` or `2h07m`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


# What every validation row has; an objective may have figures besides
VALIDATION = ("step", "split", "loss", "perplexity", "bits_per_byte", "seconds")


def train_line(row: dict, num_steps: int, eta_seconds: float) -> str:
    """Returns the progress line of a train row."""
    parts = [
        _step(row, num_steps),
        "loss not finite" if row["loss"] is None else f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.2e}",
        f"{row['tokens_per_second']:,.0f} tok/s",
    ]
    if row["mfu"] is not None:
        parts.append(f"mfu {row['mfu']:.1%}")
    return " | ".join([*parts, f"eta {duration(eta_seconds)}"])


def validation_line(row: dict, num_steps: int) -> str:
    """Returns the progress line of a validation row."""
    if row["loss"] is None:
        return f"{_step(row, num_steps)} | validation loss not finite"
    parts = [_step(row, num_steps), f"validation loss {row['loss']:.4f}"]
    if row["perplexity"] is not None:
        parts.append(f"perplexity {row['perplexity']:.2f}")
    if row["bits_per_byte"] is not None:
        parts.append(f"{row['bits_per_byte']:.4f} bits/byte")
    more = {
        name: value for name, value in row.items() if name not in VALIDATION and value is not None
    }
    parts += [f"{name.replace('_', ' ')} {value:.4f}" for name, value in more.items()]
    return " | ".join([*parts, duration(row["seconds"])])


def _step(row: dict, num_steps: int) -> str:
    return f"step {row['step']:>{len(str(num_steps))}}/{num_steps}"


class Bar:
    """Progress through `total` (0: unknown) of a `unit`, "MB" for bytes: one line redrawn on a
    terminal, else a line every 5 s. Use it in a `with` block, whose end clears the line."""

    def __init__(self, label: str, total: int, unit: str = "MB"):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.scale, self.digits = (1e6, 1) if unit == "MB" else (1, 0)
        self.began = self.shown = time.monotonic()
        self.interval = 0.2 if sys.stderr.isatty() else INTERVAL

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception) -> None:
        _clear()

    def advance(self, amount: int = 1) -> None:
        """Counts `amount` more."""
        self.done += amount
        now = time.monotonic()
        if now - self.shown < self.interval:
            return
        self.shown, rate = now, self.done / (now - self.began)
        line = f"{self.label} {min(self.done, self.total or self.done) / self.scale:,.0f}"
        if self.total:
            line += f"/{self.total / self.scale:,.0f}"
        line += f" {self.unit} | {rate / self.scale:,.{self.digits}f}/s"
        if self.total and rate:
            line += f" | eta {duration(max(self.total - self.done, 0) / rate)}"
        _draw(line)


@contextlib.contextmanager
def elapsed(label: str) -> Iterator[None]:
    """Shows the seconds that the `with` block has taken so far, for what cannot say how far it
    is."""
    began, ended = time.monotonic(), threading.Event()

    def show() -> None:
        while not ended.wait(INTERVAL):
            _draw(f"{label} {duration(time.monotonic() - began)} so far")

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _clear()


def _draw(line: str) -> None:
    say(*(("\r" + line + "\x1b[K", "") if sys.stderr.isatty() else (line,)))


def _clear() -> None:
    if sys.stderr.isatty():
        say("\r\x1b[K", end="")
