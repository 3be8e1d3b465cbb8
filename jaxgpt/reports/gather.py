"""Reads what a report shows from workdirs: rows, samples, evaluations, config, and what is saved
with the checkpoints; writes the page."""

import json
import math
import statistics
from pathlib import Path

from etils import epath

from jaxgpt.checkpointing.choice import best_of, read_meta
from jaxgpt.config import Config
from jaxgpt.config.schema import fields_of, get_field
from jaxgpt.config.stored import read_config
from jaxgpt.evaluation.results import read_results
from jaxgpt.metrics.rows import METRICS, SAMPLES, read_rows
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged

TEMPLATE = Path(__file__).with_name("report.html")
MAX_POINTS = 1500  # of a curve: more than a screen has pixels
MAX_SAMPLES = 60
MAX_EXPERTS = 16  # that have a curve each
TRAIN = ("step", "tokens", "seconds", "loss", "learning_rate", "grad_norm", "tokens_per_second")
TRAIN += ("mfu", "router_entropy", "dropped_share", "expert_load")
VALIDATION = ("step", "tokens", "seconds", "loss", "bits_per_byte")
EXTREMES = ("loss", "grad_norm")  # whose spikes stay when a curve is thinned


def gather(workdir: str) -> dict:
    """Returns what the page shows of a run, as JSON. Raises `BadInput` if there is no run, or it
    has no rows."""
    folder = epath.Path(workdir)
    config = read_config(folder)
    rows = read_rows(folder / "metrics.jsonl", METRICS)
    if not rows:
        raise BadInput(f"{folder}/metrics.jsonl holds no rows yet; train first")
    train = [row for row in rows if row["split"] == "train"]
    validation = _validation_rows(rows)
    meta = _newest_meta(folder)
    values = {path: get_field(config, path) for path in fields_of(config)}
    default = Config()
    return {
        "name": folder.resolve().name,
        "train": _columns(thinned := _thin_curve(train), TRAIN),
        "expert_shares": _expert_shares(thinned),
        "validation": _columns(validation, VALIDATION),
        "bits_per_nat": _bits_per_nat(validation),
        "samples": _thin(read_rows(folder / "samples.jsonl", SAMPLES), MAX_SAMPLES),
        "evaluations": read_results(folder),
        "config": values,
        "changed": [path for path, value in values.items() if value != get_field(default, path)],
        "facts": _facts(rows, train, validation) | {"num_steps": config.num_steps},
        "data": meta.get("data", {}),
        "environment": meta.get("environment", {}) | meta.get("versions", {}),
    }


def _validation_rows(rows: list[dict]) -> list[dict]:
    """Returns the validation rows, with the tokens that the run had seen."""
    found, tokens = [], 0
    for row in rows:
        tokens = row.get("tokens", tokens)
        if row["split"] == "validation":
            found.append(row | {"tokens": tokens})
    return found


def _facts(rows: list[dict], train: list[dict], validation: list[dict]) -> dict:
    finite = [row for row in validation if row["loss"] is not None]
    step, _ = best_of([(row["step"], row["loss"]) for row in finite])
    best = next((row for row in finite if row["step"] == step), {})
    speeds = [row["tokens_per_second"] for row in train if "tokens_per_second" in row]
    return {
        "step": rows[-1]["step"],
        "seconds": rows[-1]["seconds"],
        "tokens": train[-1].get("tokens", 0) if train else 0,
        "not_finite": sum(row["loss"] is None for row in train),
        "best_loss": best.get("loss"),
        "best_step": best.get("step"),
        "best_bits_per_byte": best.get("bits_per_byte"),
        "last_loss": finite[-1]["loss"] if finite else None,
        "last_step": finite[-1]["step"] if finite else None,
        "tokens_per_second": statistics.median_high(speeds) if speeds else None,
    }


def _bits_per_nat(validation: list[dict]) -> float | None:
    """Returns the bits per byte of a loss of one nat per token: tokens / bytes / ln 2 of the
    validation part, from its newest row."""
    for row in reversed(validation):
        if row["loss"] and row.get("bits_per_byte"):
            return row["bits_per_byte"] / row["loss"]
    return None


def _newest_meta(folder: epath.Path) -> dict:
    """Returns what is saved with the newest checkpoint where that can be read, {} if there is
    none. The weights are not looked at."""
    checkpoints = folder / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    for step in sorted((int(name) for name in names if name.isdecimal()), reverse=True):
        try:
            return read_meta(checkpoints / str(step))
        except Damaged:
            continue
    return {}


def _columns(rows: list[dict], names: tuple[str, ...]) -> dict[str, list]:
    return {name: [row.get(name) for row in rows] for name in names}


def _expert_shares(rows: list[dict]) -> dict[str, list]:
    """Returns the curves of the experts' shares of the tokens by name; of many experts those of the
    fullest, the median and the emptiest at each step. {} of a dense model."""
    experts = sum(name.startswith("expert_share/") for name in (rows[-1] if rows else {}))
    shares = [[row.get(f"expert_share/{i}") for i in range(experts)] for row in rows]
    if experts <= MAX_EXPERTS:
        return {f"expert {i}": [row[i] for row in shares] for i in range(experts)}
    ranked = [row if None in row else sorted(row) for row in shares]
    places = {"fullest expert": -1, "median expert": experts // 2, "emptiest expert": 0}
    return {name: [row[place] for row in ranked] for name, place in places.items()}


def _thin_curve(rows: list[dict]) -> list[dict]:
    """Returns at most `MAX_POINTS` of the rows: the last one, and of each stretch of the others
    the rows with the lowest and the highest of `EXTREMES`, so that no spike is lost."""
    if len(rows) <= MAX_POINTS:
        return rows

    def of(i: int, name: str) -> float:
        value = rows[i].get(name)
        return math.inf if value is None else value  # None: not finite

    last = len(rows) - 1
    length = math.ceil(last / ((MAX_POINTS - 1) // (2 * len(EXTREMES))))
    kept = {last}
    for first in range(0, last, length):
        for name in EXTREMES:
            stretch = sorted(range(first, min(first + length, last)), key=lambda i: of(i, name))
            kept |= {stretch[0], stretch[-1]}
    return [rows[i] for i in sorted(kept)]


def _thin(items: list, most: int) -> list:
    """Returns about `most` of the items, evenly spread, the last one included."""
    every = -(-len(items) // most) or 1
    return items[::-1][::every][::-1]


def page(runs: list[dict]) -> str:
    """Returns the page that shows `runs` (see `gather`): a self-contained HTML file, the template
    with its style, its script and the runs' JSON in it."""
    # "<" is escaped so that no sample can end the script element
    data = json.dumps(runs, ensure_ascii=False).replace("<", "\\u003c")
    title = ", ".join(run["name"] for run in runs)
    escaped = title.replace("&", "&amp;").replace("<", "&lt;")
    style, elements, script = (
        TEMPLATE.with_name(name).read_text(encoding="utf-8")
        for name in ("report.css", "elements.js", "report.js")
    )
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("/*RUNS*/")
    head = head.replace("/*STYLE*/", style).replace("<!--TITLE-->", escaped)
    return head + data + tail.replace("/*SCRIPT*/", elements + script)
