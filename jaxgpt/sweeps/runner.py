"""Trains the runs of a sweep, each in its own process, and reads their validation losses."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from etils import epath

from jaxgpt.config import Config
from jaxgpt.config.stored import check_resume, read_config
from jaxgpt.metrics.progress import duration
from jaxgpt.metrics.rows import METRICS, read_rows
from jaxgpt.sweeps.grid import Choice, apply_choice, name_of
from jaxgpt.system.console import say
from jaxgpt.training.end import read_end

# The variables by which CUDA, ROCm and libtpu show one device to a process
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS")
ONE_CHIP = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
DIVERGED = 3  # train's exit code
COMPLETE = ("num_steps", "early_stop")  # how a run ends; one that diverged is tried again


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code, and the step and validation loss that it is ranked by.

    With early stopping that is the best validation, whose checkpoint is kept; else the last.
    """

    code: int
    step: int = 0
    loss: float | None = None


def run_rung(
    config: Config, choices: list[Choice], command: list[str], folder: Path, steps: int, jobs: int
) -> list[Outcome]:
    """Trains each choice of `config` for `steps` in `folder` and returns how each ended.

    After a kill, runs that have ended with the same config are not trained again, and the others
    resume. With `jobs` > 1 that many runs are trained at once, job i on device i.
    """
    devices: SimpleQueue = SimpleQueue()
    for device in range(jobs):
        devices.put(device)
    folder.mkdir(parents=True, exist_ok=True)
    children, losses, ended = Children(), [], []
    began = time.monotonic()

    def run(numbered: tuple[int, Choice]) -> Outcome:
        number, choice = numbered
        workdir, overrides = folder / name_of(choice), {"num_steps": steps} | choice
        outcome = finished_outcome(workdir, apply_choice(config, overrides))
        if outcome is None:
            device = devices.get()
            try:
                argv = [*command, *flags_of(overrides), f"--workdir={workdir}"]
                code = children.train(argv, f"{workdir}.log", device if jobs > 1 else None)
            finally:
                devices.put(device)
            outcome = read_outcome(workdir, code)
        text = f"failed with exit code {outcome.code}, see {workdir}.log"
        if outcome.loss is not None:
            best = min([outcome.loss, *losses])
            losses.append(outcome.loss)
            text = f"validation loss {outcome.loss:.4f} (best so far {best:.4f})"
        ended.append(choice)
        if left := len(choices) - len(ended):
            each = (time.monotonic() - began) / len(ended)
            text += f" | {len(ended)} done, {left} to go, eta {duration(each * left)}"
        if not children.stopped:
            say(f"{number:>3}/{len(choices)}  {name_of(choice)}  {text}")
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(run, enumerate(choices, start=1)))
        except BaseException:  # also a signal to this process
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise


class Children:
    """The training processes that are running."""

    def __init__(self):
        self.lock, self.running, self.stopped = threading.Lock(), set(), False

    def train(self, argv: list[str], log: str, device: int | None) -> int:
        """Runs `train` with these arguments to its end; returns its exit code."""
        env = dict(os.environ)
        if device is not None:
            env |= {name: str(device) for name in VISIBLE} | ONE_CHIP
        child = [sys.executable, "-m", "jaxgpt.sweeps.child", str(os.getpid()), "jaxgpt.train"]
        with open(log, "a") as out:
            with self.lock:
                if self.stopped:
                    return -1
                # in its own process group, so that Ctrl-C reaches only the sweep, which forwards it
                process = subprocess.Popen(
                    [*child, *argv], env=env, stdout=out, stderr=out, process_group=0
                )
                self.running.add(process)
            try:
                return process.wait()
            finally:
                self.running.discard(process)

    def stop(self) -> None:
        """Makes the processes save and exit, and waits for them; a second signal kills them."""
        with self.lock:
            self.stopped, running = True, list(self.running)
        for process in running:
            process.terminate()
        if running:
            say(f"stopping  {len(running)} run(s), which save first")
        try:
            for process in running:
                process.wait()
        except BaseException:
            for process in running:
                process.kill()
            raise


def flags_of(values: Choice) -> list[str]:
    """Returns fields and their values as flags for `train`."""
    return [f"--config.{path}={value}" for path, value in values.items()]


def finished_outcome(workdir: Path, config: Config) -> Outcome | None:
    """Returns how the run in `workdir` ended, None if it has not ended with this `config`, which
    `check_resume` compares with its own."""
    if not (workdir / "config.json").exists():
        return None
    old = read_config(epath.Path(workdir))
    config.model.vocab_size = config.model.vocab_size or old.model.vocab_size
    config.shrink.done = old.shrink.done
    if config.num_epochs:  # the number of steps follows from it and the data
        config.num_steps = old.num_steps
    if check_resume(old, config, workdir) or read_end(epath.Path(workdir)) not in COMPLETE:
        return None
    return read_outcome(workdir, 0)


def read_outcome(workdir: Path, code: int) -> Outcome:
    """Returns the outcome of a run whose process ended with `code`."""
    rows = [] if code else read_rows(workdir / "metrics.jsonl", METRICS)
    rows = [row for row in rows if row["split"] == "validation" and row["loss"] is not None]
    if not rows:
        return Outcome(code or DIVERGED)  # it ended normally, but without a finite loss
    patience = read_config(epath.Path(workdir)).early_stop
    row = min(rows, key=lambda row: row["loss"]) if patience else rows[-1]
    return Outcome(0, row["step"], row["loss"])
