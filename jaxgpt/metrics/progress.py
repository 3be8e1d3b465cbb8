"""Lines for people."""


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
        f"step {row['step']:>{len(str(num_steps))}}/{num_steps}",
        f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.2e}",
        f"{row['tokens_per_second']:,.0f} tok/s",
    ]
    if row["mfu"] is not None:
        parts.append(f"mfu {row['mfu']:.1%}")
    return " | ".join([*parts, f"eta {duration(eta_seconds)}"])


def validation_line(row: dict, num_steps: int) -> str:
    """Returns the progress line of a validation row."""
    return (
        f"step {row['step']:>{len(str(num_steps))}}/{num_steps} | validation loss"
        f" {row['loss']:.4f} | perplexity {row['perplexity']:.2f}"
        f" | {row['bits_per_byte']:.4f} bits/byte | {duration(row['seconds'])}"
    )
