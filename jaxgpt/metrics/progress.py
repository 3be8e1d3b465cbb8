"""Progress as people read it: the lines of training, and a bar."""

import sys
import time


def duration(seconds: float) -> str:
    """Returns `4.2s`, `3m05s` or `2h07m`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


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
    return (
        f"{_step(row, num_steps)} | validation loss {row['loss']:.4f}"
        f" | perplexity {row['perplexity']:.2f} | {row['bits_per_byte']:.4f} bits/byte"
        f" | {duration(row['seconds'])}"
    )


def _step(row: dict, num_steps: int) -> str:
    return f"step {row['step']:>{len(str(num_steps))}}/{num_steps}"


class Bar:
    """Progress through `total` bytes: one line redrawn on a terminal, else a line every 10 s."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, total, 0
        self.began = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def advance(self, amount: int) -> None:
        """Counts `amount` bytes more."""
        self.done += amount
        now = time.monotonic()
        if now - self.shown > (0.2 if self.terminal else 10):
            self.shown = now
            rate = self.done / (now - self.began)
            line = f"{self.label} {self.done / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s"
            if self.total:
                share = min(self.done / self.total, 1.0)
                line += f", {share:.0%} | eta {duration(max(self.total - self.done, 0) / rate)}"
            _draw(f"\r{line}\x1b[K" if self.terminal else f"{line}\n")

    def close(self) -> None:
        """Clears the terminal's line."""
        if self.terminal:
            _draw("\r\x1b[K")


def _draw(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)
