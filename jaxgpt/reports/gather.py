"""Reads what a report shows from workdirs: rows, samples, config, and the checkpoints' metadata;
writes the page."""

import json
import statistics
from pathlib import Path

from etils import epath

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config.schema import fields_of, get_field
from jaxgpt.config.stored import read_config
from jaxgpt.metrics.rows import METRICS, SAMPLES, read_rows
from jaxgpt.system.errors import BadInput

TEMPLATE = Path(__file__).with_name("report.html")
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


def gather(workdir: str) -> dict:
    """Returns what the page shows of a run, as JSON. Raises `BadInput` if there is no run, or it
    has no rows."""
    folder = epath.Path(workdir)
    config = read_config(folder)
    rows = read_rows(folder / "metrics.jsonl", METRICS)
    if not rows:
        raise BadInput(f"{folder}/metrics.jsonl holds no rows yet; train first")
    train = [row for row in rows if row["split"] == "train"]
    validation = [row for row in rows if row["split"] == "validation" and row["loss"] is not None]
    best = min(validation, key=lambda row: row["loss"], default={})
    speeds = [row["tokens_per_second"] for row in train if "tokens_per_second" in row]
    meta = _newest_meta(folder)
    return {
        "name": folder.resolve().name,
        "curves": {name: _curve(rows, *source) for name, source in CURVES.items()},
        "samples": _thin(read_rows(folder / "samples.jsonl", SAMPLES), MAX_SAMPLES),
        "config": {path: get_field(config, path) for path in fields_of(config)},
        "facts": {
            "step": rows[-1]["step"],
            "num_steps": config.num_steps,
            "seconds": rows[-1]["seconds"],
            "tokens": train[-1].get("tokens", 0) if train else 0,
            "best_loss": best.get("loss"),
            "best_step": best.get("step"),
            "best_bits_per_byte": best.get("bits_per_byte"),
            "tokens_per_second": statistics.median_high(speeds) if speeds else None,
        },
        "data": meta.get("data", {}),
        "environment": meta.get("environment", {}) | meta.get("versions", {}),
    }


def _newest_meta(folder: epath.Path) -> dict:
    try:
        checkpoints = Checkpoints(folder, read_only=True)
    except BadInput:
        return {}
    whole = checkpoints.whole()
    return checkpoints.meta(whole[-1]) if whole else {}


def _curve(rows: list[dict], split: str, name: str) -> list:
    points = [[r["step"], r[name]] for r in rows if r["split"] == split and r.get(name) is not None]
    return _thin(points, MAX_POINTS)


def _thin(items: list, most: int) -> list:
    """Returns about `most` of the items, evenly spread, the last one included."""
    every = -(-len(items) // most) or 1
    return items[::-1][::every][::-1]


def page(runs: list[dict]) -> str:
    """Returns the page that shows `runs` (see `gather`): a self-contained HTML file, the template
    with the runs' JSON in it."""
    # "<" is escaped so that no sample can end the script element
    data = json.dumps(runs, ensure_ascii=False).replace("<", "\\u003c")
    title = ", ".join(run["name"] for run in runs)
    escaped = title.replace("&", "&amp;").replace("<", "&lt;")
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("/*RUNS*/")
    return head.replace("<!--TITLE-->", escaped) + data + tail
