"""How a run ended: `end.json` in its workdir, for whoever waits for it (`evaluate --watch`).

    {"step": 280, "reason": "early_stop"}

A run that a signal or an error stopped has not ended: the same command goes on with it.
"""

import json

from etils import epath

from jaxgpt.config import BadInput
from jaxgpt.config.files import write_whole

FILE = "end.json"
REASONS = ("num_steps", "early_stop", "diverged")


def record_end(workdir: epath.Path, step: int, reason: str) -> None:
    """Writes that the run in `workdir` ended after `step`; its checkpoints must be written."""
    write_whole(workdir / FILE, json.dumps({"step": step, "reason": reason}))


def forget_end(workdir: epath.Path) -> None:
    """Removes the record: the run goes on."""
    (workdir / FILE).unlink(missing_ok=True)


def read_end(workdir: epath.Path) -> str:
    """Returns why the run in `workdir` ended, one of `REASONS`; '' if it has not.

    Raises:
      BadInput: if the record is damaged.
    """
    file = workdir / FILE
    if not file.exists():
        return ""
    try:
        reason = json.loads(file.read_text())["reason"]
    except (ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{file} is damaged; delete it: {e!r}") from e
    if reason not in REASONS:
        raise BadInput(f"{file} is damaged; delete it: its reason is {reason!r}")
    return reason
