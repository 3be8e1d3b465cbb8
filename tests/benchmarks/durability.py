"""Durability's long checks.

    python tests/benchmarks/durability.py kills [--count=100]
    python tests/benchmarks/durability.py saving [--steps=60]

`kills` runs one config without a kill, then again with `count` SIGKILLs, each at a random instant
after new progress (during saves too), and compares every row. `saving` trains GPT-2 124M's shape
with and without a save every tenth step, and prints the share of the time that saving took (what the
steps in which a save begins or runs took beyond the median step, after the first two saves), and the
peak memory during it beyond training's own, over the state's size.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLED = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps={steps}, batch_size=4, log_every=1, eval_every=50, checkpoint_every=5,
        model=ModelConfig(max_seq_len=64, num_layers=2, num_heads=2, embed_dim=64, dropout=0.1),
        data=DataConfig(tokenizer="byte"),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=10, ema_decay=0.9),
    )
"""
SAVED = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps={steps}, batch_size=2, log_every=1, eval_every=0, eval_batches=1,
        sample=SampleConfig(max_new_tokens=1), checkpoint_every={every}, keep_checkpoints=1,
        model=presets.gpt2(num_layers=12, num_heads=12, embed_dim=768, dtype="float32",
                           vocab_size=50257, max_seq_len=256),
        data=DataConfig(tokenizer="byte"),
    )
"""


def started(folder: Path, workdir: str) -> subprocess.Popen:
    env = os.environ | {
        "JAXGPT_CACHE": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
    }
    with open(folder / "log", "w") as log:  # a pipe that nobody reads would fill and stop the run
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jaxgpt.train",
                f"--config={folder}/c.py",
                f"--workdir={folder}/{workdir}",
            ],
            env=env,
            stderr=log,
        )


def rows(workdir: Path) -> list[dict]:
    """The rows so far, without what time decides; a half-written last line is left out."""
    text = (workdir / "metrics.jsonl").read_text() if (workdir / "metrics.jsonl").exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{k: row[k] for k in ("step", "split", "loss")} for row in found]


def last_step(workdir: Path) -> int:
    found = rows(workdir)
    return found[-1]["step"] if found else 0


def kills(count: int) -> dict:
    chance, steps, began = random.Random(0), 30 * count, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "c.py").write_text(KILLED.format(steps=steps))
        assert started(folder, "whole").wait() == 0, (folder / "log").read_text()[-2000:]
        done = saving = 0
        while done < count:
            process, before = started(folder, "killed"), last_step(folder / "killed")
            while last_step(folder / "killed") <= before + 5 and process.poll() is None:
                time.sleep(0.01)  # past the checkpoint it went back to, so that it gets somewhere
            time.sleep(chance.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, (folder / "log").read_text()[-2000:]
            saving += bool(list((folder / "killed/checkpoints").glob("*tmp*")))
            done += 1
        assert started(folder, "killed").wait() == 0, (folder / "log").read_text()[-2000:]
        same = rows(folder / "whole") == rows(folder / "killed")
    return {
        "kills": done,
        "during_a_save": saving,
        "steps": steps,
        "identical": same,
        "seconds": time.monotonic() - began,
    }


def saving(steps: int) -> dict:
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, every in (("without", 0), ("with", 10)):
            (folder / "c.py").write_text(SAVED.format(steps=steps, every=every))
            process, peak = started(folder, name), 0
            while process.poll() is None:
                status = Path(f"/proc/{process.pid}/statm").read_text().split()
                peak = max(peak, int(status[1]) * 4096 if len(status) > 1 else 0)
                time.sleep(0.02)
            assert process.returncode == 0, (folder / "log").read_text()[-2000:]
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
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    print(json.dumps(kills(args.count) if args.what == "kills" else saving(args.steps)))
