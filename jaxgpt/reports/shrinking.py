"""`shrink.json` and `shrink.html` in a workdir that `shrink` wrote: every method beside the
original."""

import json
from pathlib import Path

from etils import epath

from jaxgpt.system.files import Missing, read_json, write_whole

TEMPLATE = Path(__file__).with_name("shrink.html")
STYLE = Path(__file__).with_name("report.css")
ELEMENTS = Path(__file__).with_name("elements.js")
# What a row holds; `zeros` is the share of the projections' weights that are 0
ROW = {
    **{"workdir": str, "method": str, "command": str, "bytes_on_disk": int, "resident_bytes": int},
    **{"zeros": float, "bits_per_byte": float},
    **{"tokens_per_second_1": float | None, "tokens_per_second_8": float | None},
}


def read_rows(workdir: epath.PathLike) -> list[dict]:
    """Returns the rows in a workdir's `shrink.json`, [] if it has none. Raises `BadInput` if the
    file is damaged."""
    file = epath.Path(workdir) / "shrink.json"
    try:
        return read_json(file, [ROW], "delete it, or restore it from a copy")
    except Missing:
        return []


def write_rows(folder: Path, rows: list[dict]) -> None:
    """Writes `shrink.json` and `shrink.html`; of several rows of one workdir the last counts."""
    rows = list({row["workdir"]: row for row in rows}.values())
    write_whole(folder / "shrink.json", json.dumps(rows, indent=1) + "\n")
    write_whole(folder / "shrink.html", page(rows))


def page(rows: list[dict]) -> str:
    """Returns a self-contained page with a table and plots of the rows, the first the original."""
    data = json.dumps(rows, ensure_ascii=False).replace("<", "\\u003c")
    title = Path(rows[0]["workdir"]).name.replace("&", "&amp;").replace("<", "&lt;")
    text = TEMPLATE.read_text(encoding="utf-8").replace("<!--TITLE-->", title)
    for place, file in (("/*STYLE*/", STYLE), ("/*ELEMENTS*/", ELEMENTS)):
        text = text.replace(place, file.read_text(encoding="utf-8"))
    return text.replace("/*ROWS*/", data)
