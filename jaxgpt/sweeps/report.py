"""A sweep's results: a table, `results.json`, and a plot as SVG."""

import json
import math
from html import escape
from pathlib import Path

from jaxgpt.config.files import write_whole
from jaxgpt.sweeps.grid import Choice

PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 280, 220, 48


def write_results(folder: Path, rows: list[dict]) -> str:
    """Writes results.json and results.svg into `folder`; returns the table as text.

    A row is {"choice", "steps", "loss"}; loss None = failed. Best first, most steps first.
    """
    rows = sorted(rows, key=lambda r: (-r["steps"], math.inf if r["loss"] is None else r["loss"]))
    write_whole(folder / "results.json", json.dumps(rows, indent=1) + "\n")
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

    Only the runs of the longest rung are drawn: others are not comparable.
    """
    done = [r for r in rows if r["loss"] is not None and r["steps"] == rows[0]["steps"]]
    fields = list(rows[0]["choice"])
    width, height = MARGIN + len(fields) * PANEL_WIDTH, PANEL_HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    if done:
        low, high = min(r["loss"] for r in done), max(r["loss"] for r in done)
        for i, field in enumerate(fields):
            parts += _panel(field, done, MARGIN + i * PANEL_WIDTH, low, (high - low) or 1.0)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(field: str, rows: list[dict], left: int, low: float, span: float) -> list[str]:
    values = sorted({r["choice"][field] for r in rows})
    inner, bottom = PANEL_WIDTH - MARGIN, MARGIN + PANEL_HEIGHT

    def x(choice: Choice) -> float:
        return left + inner * (values.index(choice[field]) + 0.5) / len(values)

    def y(loss: float) -> float:
        return bottom - 10 - (PANEL_HEIGHT - 20) * (loss - low) / span

    parts = [
        f'<text x="{left}" y="{MARGIN - 16}" font-weight="bold">{escape(field)}</text>',
        f'<path d="M{left} {MARGIN}V{bottom}H{left + inner}" fill="none" stroke="#888"/>',
    ]
    for loss in (low, low + span):
        parts.append(f'<text x="{left - 4}" y="{y(loss):.1f}" text-anchor="end">{loss:.3f}</text>')
    for value in values:
        at = x({field: value})
        parts.append(
            f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(str(value))}</text>'
        )
    for row in rows:
        best = row["loss"] == low
        parts.append(
            f'<circle cx="{x(row["choice"]):.1f}" cy="{y(row["loss"]):.1f}" r="{6 if best else 4}"'
            f' fill="{"#d95f02" if best else "#1b6ca8"}" fill-opacity="0.75"/>'
        )
    return parts
