"""Durability's long checks.

    python -m tests.benchmarks.durability kills [--count=100] [--processes=2] [--store=s3|gs]
    python -m tests.benchmarks.durability saving [--steps=60]

`kills` runs one config without a kill, then again with `count` SIGKILLs, each at a random instant
after new progress (during saves too), and compares every row; of several processes one is killed
and the others must end by themselves; a store is a server on this machine
(tests/processes/stores.py). `saving` trains GPT-2 124M's shape
with and without a save every tenth step, and prints the share of the time that saving took (what
the steps in which a save begins or runs took beyond the median step, after the first two saves),
and the peak memory during it beyond training's own, over the state's size.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from etils import epath

from jaxgpt.metrics.rows import ROW, read_rows
from jaxgpt.system import stores
from tests.conftest import ROOT, xla_flags
from tests.processes.processes import free_port
from tests.processes.stores import served

FORKS = multiprocessing.get_context("forkserver")
KILLED = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps={steps}, batch_size=4, log_every=1, eval_every=50, checkpoint_every=5,
        model=ModelConfig(max_seq_len=32, num_layers=1, num_heads=2, embed_dim=32, dropout=0.1),
        data=DataConfig(tokenizer="byte", source="text:{root}/LICENSE"),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=10, ema_decay=0.9), {mesh}
    )
"""
SAVED = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps={steps}, batch_size=2, log_every=1, eval_every=0, eval_batches=1,
        sample=SampleConfig(max_new_tokens=1), checkpoint_every={every}, keep_checkpoints=1,
        model=presets.gpt2(num_layers=12, num_heads=12, embed_dim=768,
                           vocab_size=50257, max_seq_len=256),
        data=DataConfig(tokenizer="byte"),
    )
"""


def train_as_ordered(argv: list[str], log: str) -> None:
    """Runs the command `train` in a process of its own, which has imported it already."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ["XLA_FLAGS"] = xla_flags(1)  # the tests' modules have asked for eight devices
    sys.argv = ["train", *argv]
    from jaxgpt import train
    from jaxgpt.cli.run import run

    run(train.main)


def started(folder: Path, workdir: str, processes: int = 1) -> list[BaseProcess]:
    """Starts the processes of a run in `workdir`, a path or a URL.

    They are forked from one that has imported jaxgpt, which takes longer than what is measured.
    """
    argv = [f"--config={folder}/c.py", f"--workdir={workdir}"]
    if processes > 1:
        argv.append(f"--coordinator=127.0.0.1:{free_port()}")
        argv.append(f"--num_processes={processes}")
    found = []
    for i in range(processes):
        own = [f"--process_id={i}"] if processes > 1 else []
        args = ([*argv, *own], f"{folder}/log{i}")
        found.append(FORKS.Process(target=train_as_ordered, args=args))
        found[-1].start()
    return found


def rows(workdir: str) -> list[dict]:
    """The rows so far, without what time decides."""
    found = read_rows(epath.Path(workdir) / "metrics.jsonl", ROW)
    return [{k: row[k] for k in ("step", "split", "loss")} for row in found]


def last_step(workdir: str) -> int:
    found = rows(workdir)
    return found[-1]["step"] if found else 0


def prepare_forks(folder: Path) -> None:
    """Sets the environment of all processes that `started` will start."""
    os.environ |= {
        "JAXGPT_CACHE": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    FORKS.set_forkserver_preload(["jaxgpt.train"])


def code_of(process: BaseProcess) -> int:
    """Waits for a process and returns its exit code."""
    process.join()
    return process.exitcode


def is_saving(workdir: str) -> bool:
    """Says whether a checkpoint is half written: it has a temporary name, or no commit file."""
    folder = epath.Path(workdir) / "checkpoints"
    if "://" not in workdir:
        return any("tmp" in step.name for step in folder.iterdir())
    return any(not (step / "commit_success.txt").exists() for step in folder.iterdir())


def kills(count: int, processes: int, store: str) -> dict:
    chance, steps, began = random.Random(0), 30 * count, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder, place = Path(scratch), scratch
        if store:
            place, env = stack.enter_context(served(store))
            os.environ.update(env)
            stores.check_store(place)

        prepare_forks(folder)

        def logs() -> str:
            return "".join(log.read_text()[-2000:] for log in sorted(folder.glob("log*")))

        def finish() -> None:
            assert not any([code_of(process) for process in started(folder, workdir, processes)]), (
                logs()
            )

        mesh = f"mesh=MeshConfig(data={processes}),"
        (folder / "c.py").write_text(KILLED.format(steps=steps, mesh=mesh, root=ROOT))
        workdir = f"{place}/whole"
        finish()
        whole, workdir = rows(workdir), f"{place}/killed"
        saving, outlived = 0, []
        for _ in range(count):
            running, before = started(folder, workdir, processes), last_step(workdir)
            while last_step(workdir) <= before + 5 and all(p.is_alive() for p in running):
                time.sleep(0.2 if store else 0.01)  # past the checkpoint it went back to
            time.sleep(chance.uniform(0, 0.3))
            victim = chance.choice(running)
            victim.kill()
            killed = time.monotonic()
            assert code_of(victim) == -signal.SIGKILL, logs()
            saving += is_saving(workdir)
            assert all([code_of(p) for p in running]), logs()  # the others end by themselves
            outlived.append(time.monotonic() - killed)
            print(len(outlived), "kills,", last_step(workdir), "steps", file=sys.stderr, flush=True)
        finish()
        same = whole == rows(workdir)
    return {
        "kills": count,
        "processes": processes,
        "store": store or "local",
        "during_a_save": saving,
        "steps": steps,
        "identical": same,
        "seconds_until_the_others_ended": max(outlived),
        "seconds": time.monotonic() - began,
    }


def saving(steps: int) -> dict:
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, every in (("without", 0), ("with", 10)):
            (folder / "c.py").write_text(SAVED.format(steps=steps, every=every))
            prepare_forks(folder)
            (process,), peak = started(folder, f"{folder}/{name}"), 0
            while process.is_alive():
                status = Path(f"/proc/{process.pid}/statm").read_text().split()
                peak = max(peak, int(status[1]) * 4096 if len(status) > 1 else 0)
                time.sleep(0.02)
            assert code_of(process) == 0, (folder / "log0").read_text()[-2000:]
            text = (folder / name / "metrics.jsonl").read_text().splitlines()
            seconds = {row["step"]: row["seconds"] for row in map(json.loads, text)}
            # a virtual machine's memory is slow when first touched: warm after two saves
            took = [seconds[k] - seconds[k - 1] for k in range(21, steps)]
            found[name] = (took, peak)
    state = 3 * 4 * 124_475_904  # parameters and two moments, float32, padded vocabulary
    took, most = found["with"]
    usual = statistics.median(took)
    # a save begins behind step 10k, and may still be written in the two steps after it
    saved = sum(took[i] - usual for i in range(len(took)) if (21 + i) % 10 in (1, 2))
    return {
        "step_seconds": usual,
        "share": saved / sum(took),
        "seconds_with_over_without": sum(took) / sum(found["without"][0]),
        "extra_memory_over_state": (most - found["without"][1]) / state,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("kills", "saving"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--store", choices=("s3", "gs"), default="")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    if args.what == "kills":
        print(json.dumps(kills(args.count, args.processes, args.store)))
    else:
        print(json.dumps(saving(args.steps)))
