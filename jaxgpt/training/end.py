"""How a run ended: `end.json` in its workdir, for whoever waits for it (`evaluate --watch`).

    {"step": 280, "reason": "early_stop"}

A run that a signal or an error stopped has not ended: the same command goes on with it.
"""

import json

from etils import epath

from jaxgpt.system.files import Damaged, read_json, write_whole

FILE = "end.json"
REASONS = ("num_steps", "early_stop", "diverged")


def record_end(workdir: epath.Path, step: int, reason: str) -> None:
    """Writes that the run in `workdir` ended after `step`; its checkpoints must be written."""
    write_whole(workdir / FILE, json.dumps({"step": step, "reason": reason}))


def forget_end(workdir: epath.Path) -> None:
    """Removes the record: the run goes on."""
    (workdir / FILE).unlink(missing_ok=True)


def read_end(workdir: epath.Path) -> str:
    """Returns why the run in `workdir` ended, one of `REASONS`; '' if it has not. Raises `BadInput`
    if the record is damaged."""
    file = workdir / FILE
    if not file.exists():
        return ""
    reason = read_json(file, {"step": int, "reason": str}, "delete it")["reason"]
    if reason not in REASONS:
        raise Damaged(file, f"its reason is {reason!r}", "delete it")
    return reason
