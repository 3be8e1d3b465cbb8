"""Reads what a report shows from workdirs: rows, samples, config, and what checkpoints know."""

import dataclasses

from etils import epath

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config.stored import read_config
from jaxgpt.metrics.rows import METRICS, SAMPLES, read_rows
from jaxgpt.system.errors import BadInput

MAX_POINTS = 1500  # of a curve: more than a screen has pixels
MAX_SAMPLES = 60
CURVES = {
    "loss": ("train", "loss"),
    "validation": ("validation", "loss"),
    "learning_rate": ("train", "learning_rate"),
    "grad_norm": ("train", "grad_norm"),
    "tokens_per_second": ("train", "tokens_per_second"),
    "mfu": ("train", "mfu"),
}


def gathered(workdir: str) -> dict:
    """Returns what the page shows of a run, as JSON.

    Raises:
      BadInput: if there is no run, or it has no rows.
    """
    folder = epath.Path(workdir)
    config = dataclasses.asdict(read_config(folder))
    rows = read_rows(folder / "metrics.jsonl", METRICS)
    if not rows:
        raise BadInput(f"{folder}/metrics.jsonl holds no rows yet; train first")
    train = [row for row in rows if row["split"] == "train"]
    validation = [row for row in rows if row["split"] == "validation" and row["loss"] is not None]
    best = min(validation, key=lambda row: row["loss"], default=None)
    meta = _meta(folder)
    return {
        "name": folder.resolve().name,
        "curves": {name: _curve(rows, *where) for name, where in CURVES.items()},
        "samples": _thinned(read_rows(folder / "samples.jsonl", SAMPLES), MAX_SAMPLES),
        "config": {
            f"{room}.{name}" if room else name: value
            for room, fields in _rooms(config)
            for name, value in fields.items()
        },
        "facts": {
            "step": rows[-1]["step"],
            "num_steps": config["num_steps"],
            "seconds": rows[-1]["seconds"],
            "tokens": train[-1].get("tokens", 0) if train else 0,
            "best_loss": best and best["loss"],
            "best_step": best and best["step"],
            "best_bits_per_byte": best and best.get("bits_per_byte"),
            "tokens_per_second": _middle(
                [r["tokens_per_second"] for r in train if "tokens_per_second" in r]
            ),
        },
        "data": meta.get("data", {}),
        "environment": meta.get("environment", {}) | meta.get("versions", {}),
    }


def _meta(folder: epath.Path) -> dict:
    try:
        checkpoints = Checkpoints(folder, read_only=True)
    except BadInput:
        return {}
    whole = checkpoints.whole()
    return checkpoints.meta(whole[-1]) if whole else {}


def _rooms(config: dict) -> list[tuple[str, dict]]:
    rooms = [(name, value) for name, value in config.items() if isinstance(value, dict)]
    return [("", {k: v for k, v in config.items() if not isinstance(v, dict)}), *rooms]


def _curve(rows: list[dict], split: str, name: str) -> list:
    points = [[r["step"], r[name]] for r in rows if r["split"] == split and r.get(name) is not None]
    return _thinned(points, MAX_POINTS)


def _thinned(items: list, most: int) -> list:
    """Returns at most about `most` of them, evenly spread, the last one included."""
    every = -(-len(items) // most) or 1
    return items[::-1][::every][::-1]


def _middle(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
