"""The user's own proof that a killed run goes on to the same numbers."""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxgpt.metrics.progress import Bar
from jaxgpt.metrics.rows import METRICS, read_rows
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput

COMPARED = ("loss", "grad_norm", "learning_rate", "tokens")
OURS = ("--verify_resume", "--workdir")
FIXED = {"log_every": 1, "eval_every": 0, "sample_every": 0, "num_epochs": 0, "early_stop": 0}
FIXED |= {"track": ""}


def verify_resume(argv: list[str], steps: int) -> dict:
    """Trains 2 * `steps` steps twice, once killed (SIGKILL) after the checkpoint in the middle, and
    compares the rows behind it: returns {"steps", "compared", "identical"}.

    Both runs are `argv`'s own command in processes of their own, in a temporary folder.

    Raises:
      BadInput: if `steps` is no count, a run fails, or a number differs (the first is named).
    """
    if steps < 1:
        raise BadInput(f"--verify_resume={steps} must be at least 1")
    with tempfile.TemporaryDirectory(prefix="jaxgpt-verify-") as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        say(f"verify    {2 * steps} steps without a kill")
        _finish(_start(argv, steps, whole), whole, 2 * steps)
        say(f"verify    the same, killed after checkpoint {steps}")
        _kill_after(_start(argv, steps, killed), killed, steps)
        say("verify    the same command again")
        _finish(_start(argv, steps, killed), killed, 2 * steps)
        rows = [_rows(folder) for folder in (whole, killed)]
    for step in range(1, 2 * steps + 1):
        for name in COMPARED:
            one, two = (row.get(step, {}).get(name) for row in rows)
            if one != two:
                raise BadInput(
                    f"resume is not exact: step {step} has {name} {one} without a kill"
                    f" and {two} with one"
                )
    say(f"verified  steps {steps + 1} to {2 * steps} after the kill are identical, bit for bit")
    return {"steps": steps, "compared": list(COMPARED), "identical": True}


def _start(argv: list[str], steps: int, workdir: Path) -> subprocess.Popen:
    kept, skip = [], False
    for arg in argv[1:]:
        name = arg.lstrip("-").partition("=")[0]
        if f"--{name}" in OURS:
            skip = "=" not in arg
        elif skip:
            skip = False
        else:
            kept.append(arg)
    fields = FIXED | {"num_steps": 2 * steps, "checkpoint_every": steps}
    changes = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "jaxgpt.train", *kept, *changes, f"--workdir={workdir}"]
    with open(_log(workdir), "w") as log:  # a pipe that nobody reads would fill and stop the run
        return subprocess.Popen(command, stderr=log, stdout=log)


def _log(workdir: Path) -> Path:
    return workdir.with_suffix(".log")


def _finish(
    process: subprocess.Popen, workdir: Path, steps: int, expected: tuple[int, ...] = (0,)
) -> None:
    """Waits for the end of a run of `steps` steps, and shows how far it is."""
    with Bar("verify   ", steps, "steps") as bar:
        while process.poll() is None:
            time.sleep(0.1)
            rows = workdir / "metrics.jsonl"
            bar.advance(rows.read_bytes().count(b"\n") - bar.done if rows.exists() else 0)
    if process.returncode not in expected:
        last = (_log(workdir).read_text().strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"the run to verify failed: {last.removeprefix('error: ')}")


def _kill_after(process: subprocess.Popen, workdir: Path, steps: int) -> None:
    """Kills the run once checkpoint `steps` is there; the one at its end must not be."""
    while process.poll() is None and not (workdir / "checkpoints" / str(steps)).exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _finish(process, workdir, steps, (0, -signal.SIGKILL))
    end = workdir / "checkpoints" / str(2 * steps)
    if end.exists():  # it was too fast to be killed: as if the kill had come before its last save
        end.rename(workdir / "too-fast")


def _rows(workdir: Path) -> dict[int, dict]:
    rows = read_rows(workdir / "metrics.jsonl", METRICS)
    return {row["step"]: row for row in rows if row["split"] == "train"}
