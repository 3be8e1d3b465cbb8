"""One self-contained HTML file: the template with the runs' JSON in it."""

import json
from pathlib import Path

TEMPLATE = Path(__file__).with_name("report.html")


def page(runs: list[dict]) -> str:
    """Returns the page that shows `runs` (see `jaxgpt.reports.gather`)."""
    # "<" is escaped so that no sample can end the script element
    data = json.dumps(runs, ensure_ascii=False).replace("<", "\\u003c")
    title = ", ".join(run["name"] for run in runs)
    escaped = title.replace("&", "&amp;").replace("<", "&lt;")
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("/*RUNS*/")
    return head.replace("<!--TITLE-->", escaped) + data + tail
