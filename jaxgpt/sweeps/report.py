"""A sweep's results: a table, `results.json`, and a plot as SVG."""

import json
import math
from collections.abc import Iterator
from html import escape
from pathlib import Path

from jaxgpt.sweeps.grid import Choice, name_of
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import read_json, write_whole

RESULTS = "results.json"
# orange for the last rung, then from dark to light blue
COLOURS = ("#d95f02", "#1b6ca8", "#5a9bd4", "#a6c8e4", "#cfdfec")
PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 280, 220, 48


def check_results(folder: Path, choices: list[Choice]) -> None:
    """Raises `BadInput` if `folder` has results of runs that are not in `choices`."""
    file = folder / RESULTS
    if not file.exists():
        return
    schema, remedy = [{"choice": {str: object}}], "delete it and run the sweep again"
    missing = [c["choice"] for c in read_json(file, schema, remedy) if c["choice"] not in choices]
    if missing:
        raise BadInput(
            f"{file} has another grid's results, for example {name_of(missing[0])}; choose another"
            " --workdir, or a --grid that includes its runs"
        )


def write_results(folder: Path, rows: list[dict]) -> str:
    """Writes results.json and results.svg into `folder`; returns the table as text.

    A row is {"choice", "rung", "steps", "loss"}; loss None = failed. The last rung comes first, and
    in each rung the best run.
    """
    rows = sorted(rows, key=lambda r: (-r["rung"], math.inf if r["loss"] is None else r["loss"]))
    write_whole(folder / RESULTS, json.dumps(rows, indent=1) + "\n")
    write_whole(folder / "results.svg", plot(rows))
    return table(rows)


def table(rows: list[dict]) -> str:
    """Returns an aligned table: steps, validation loss, and each field of the choice."""
    fields = list(rows[0]["choice"])
    cells = [["steps", "validation loss", *fields]]
    for row in rows:
        loss = "failed" if row["loss"] is None else f"{row['loss']:.4f}"
        cells.append([str(row["steps"]), loss, *(str(row["choice"][f]) for f in fields)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(lines)


def plot(rows: list[dict]) -> str:
    """Returns an SVG with a panel per field: validation loss over the field's values in order.

    Every rung of a halving is drawn, in a colour of its own, as a legend tells: losses after
    different numbers of steps are not to be compared.
    """
    done = [r for r in rows if r["loss"] is not None]
    fields = list(rows[0]["choice"])
    width, height = MARGIN + len(fields) * PANEL_WIDTH, PANEL_HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    rungs = sorted({r["rung"] for r in done}, reverse=True)
    colours = {rung: COLOURS[min(i, len(COLOURS) - 1)] for i, rung in enumerate(rungs)}
    for i, field in enumerate(fields if done else []):
        parts += _panel(field, done, colours, MARGIN + i * PANEL_WIDTH)
    for i, rung in enumerate(rungs if len(rungs) > 1 else []):
        x, steps = MARGIN + 100 * i, max(r["steps"] for r in done if r["rung"] == rung)
        parts.append(f'<text x="{x}" y="16" fill="{colours[rung]}">{steps} steps</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(field: str, rows: list[dict], colours: dict[int, str], left: int) -> Iterator[str]:
    values = sorted({r["choice"][field] for r in rows})
    low, high = min(r["loss"] for r in rows), max(r["loss"] for r in rows)
    inner, bottom, span = PANEL_WIDTH - MARGIN, MARGIN + PANEL_HEIGHT, (high - low) or 1.0
    best = min(rows, key=lambda r: (-r["rung"], r["loss"]))

    def x(value) -> float:
        return left + inner * (values.index(value) + 0.5) / len(values)

    def y(loss: float) -> float:
        return bottom - 10 - (PANEL_HEIGHT - 20) * (loss - low) / span

    yield f'<text x="{left}" y="{MARGIN - 16}" font-weight="bold">{escape(field)}</text>'
    yield f'<path d="M{left} {MARGIN}V{bottom}H{left + inner}" fill="none" stroke="#888"/>'
    for loss in (low, low + span):
        yield f'<text x="{left - 4}" y="{y(loss):.1f}" text-anchor="end">{loss:.3f}</text>'
    for value in values:
        label = f'x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle"'
        yield f"<text {label}>{escape(str(value))}</text>"
    for row in rows:
        at = f'cx="{x(row["choice"][field]):.1f}" cy="{y(row["loss"]):.1f}"'
        colour, radius = colours[row["rung"]], 6 if row is best else 4
        yield f'<circle {at} r="{radius}" fill="{colour}" fill-opacity="0.75"/>'
