"""`evaluations.jsonl` in a workdir: what `evaluate` found, for the report.

    {"step": 900, "on": "validation", "loss": 3.694, "bits_per_byte": 1.6414, ...}
    {"step": 900, "on": "hellaswag:val.jsonl", "task": "hellaswag", "accuracy": 0.27, ...}

A row is what `evaluate` printed, with the split, source or task in `on`. Rows are only added; of
two that measured the same, the later one counts.
"""

import json

from etils import epath

from jaxgpt.metrics.rows import EVALUATIONS, ROW, read_rows
from jaxgpt.system.console import say
from jaxgpt.system.stores import is_object_store, read_bytes

FLAGS = {"stride": int, "limit": int, "num_beams": int, "length_penalty": float}  # of `evaluate`
RESULTS = ROW | {"on": str} | {f"{name}?": kind for name, kind in FLAGS.items()}


def add_result(workdir: str, row: dict, on: str, stride: int = 0, limit: int | None = None) -> None:
    """Adds a row that `evaluate` printed of the split, source or task `on`, with its `--stride` and
    `--limit`; where the workdir cannot be written, one line says so."""
    flags = {"stride": stride, "limit": limit}
    stored = {"step": row["step"], "on": on} | {k: v for k, v in flags.items() if v} | row
    line = (json.dumps(stored, ensure_ascii=False) + "\n").encode()
    file = epath.Path(workdir) / EVALUATIONS
    try:
        if is_object_store(workdir):  # which cannot append
            file.write_bytes((read_bytes(file) if file.exists() else b"") + line)
        else:
            with file.open("ab") as out:
                out.write(line)
    except OSError as e:
        say(f"report    {file} cannot be written ({e}), so the report will lack this evaluation")


def read_results(workdir: epath.Path) -> list[dict]:
    """Returns the evaluations of a run by step, of those that measured the same the last."""
    rows = read_rows(workdir / EVALUATIONS, RESULTS)
    same = {(r["step"], r["on"], *map(r.get, FLAGS)): r for r in rows}
    return sorted(same.values(), key=lambda row: row["step"])
