"""Trains the runs of a sweep, each in a process of its own, and reads what they reached."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from jaxgpt.config.cli import say
from jaxgpt.metrics.rows import METRICS, read_rows
from jaxgpt.sweeps.grid import Choice, name_of

# One process sees one device: the variables that CUDA, ROCm and libtpu read.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS")
ONE_CHIP = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}


def run_rung(
    choices: list[Choice], command: list[str], folder: Path, steps: int, jobs: int
) -> list[float | None]:
    """Trains each choice for `steps` in `folder`; returns their validation losses, None = failed.

    Each run resumes or is found finished by itself, so a sweep that was killed just goes on.
    With `jobs` > 1 so many run at once, job i on device i.
    """
    devices: SimpleQueue = SimpleQueue()
    for device in range(jobs):
        devices.put(device)
    folder.mkdir(parents=True, exist_ok=True)

    def run(numbered: tuple[int, Choice]) -> float | None:
        number, choice = numbered
        workdir, overrides = folder / name_of(choice), {"num_steps": steps} | choice
        if (loss := final_loss(workdir, overrides["num_steps"])) is None:
            device = devices.get()
            try:
                code = _train(overrides, command, workdir, device if jobs > 1 else None)
            finally:
                devices.put(device)
            loss = final_loss(workdir, overrides["num_steps"]) if code == 0 else None
        outcome = f"failed, see {workdir}.log" if loss is None else f"validation loss {loss:.4f}"
        say(f"{number:>3}/{len(choices)}  {name_of(choice)}  {outcome}")
        return loss

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, enumerate(choices, start=1)))


def _train(overrides: Choice, command: list[str], workdir: Path, device: int | None) -> int:
    argv = [sys.executable, "-m", "jaxgpt.sweeps.child", str(os.getpid())]
    argv += ["jaxgpt.train", *command, f"--workdir={workdir}"]
    argv += [f"--config.{path}={value}" for path, value in overrides.items()]
    env = dict(os.environ)
    if device is not None:
        env |= {name: str(device) for name in VISIBLE} | ONE_CHIP
    with open(f"{workdir}.log", "a") as log:
        return subprocess.run(argv, env=env, stdout=log, stderr=log).returncode


def final_loss(workdir: Path, steps: int) -> float | None:
    """Returns the validation loss at `steps`, None if the run has not got there."""
    for row in read_rows(workdir / "metrics.jsonl", METRICS):
        if row["split"] == "validation" and row["step"] == steps:
            return row["loss"]
    return None
