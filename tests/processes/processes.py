"""Commands run by several real processes that talk over 127.0.0.1."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.conftest import PATIENCE, wait_until, xla_flags
from tests.processes.forks import Python

CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=24, batch_size=8, log_every=1, eval_every=12, sample_every=12, checkpoint_every=8,
        keep_checkpoints=9,
        model=ModelConfig(max_seq_len=32, num_layers=1, num_heads=2, embed_dim=32, dropout=0.1),
        data=DataConfig(tokenizer="byte", source="text:{corpus}/*.txt"),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=3, ema_decay=0.9),
        mesh=MeshConfig(data=2, fsdp=-1),
        sample=SampleConfig(max_new_tokens=0),
    )
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


Child = Python | subprocess.Popen
FRESH = partial(subprocess.Popen, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start(
    module: str, count: int, devices: int, *args: str, only=None, fresh: bool = False
) -> list[Child]:
    """Starts `count` processes (or those of `only`) of a command, each with `devices` devices;
    `fresh` ones are not forked."""
    env = os.environ | {"XLA_FLAGS": xla_flags(devices)}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # the next test starts it again
    address = f"127.0.0.1:{free_port()}"
    met = [f"--coordinator={address}", f"--num_processes={count}"] if count > 1 else []
    children = []
    for i in range(count) if only is None else only:
        argv = ["-m", f"jaxgpt.{module}", *args, *met, *([f"--process_id={i}"] if met else [])]
        children.append(
            FRESH([sys.executable, *argv], env=env) if fresh else Python(*argv, env=env)
        )
    return children


def finish(children: list[Child]) -> tuple[list, list, list]:
    """Returns the exit codes, stdouts and stderrs."""
    texts = [child.communicate(timeout=PATIENCE) for child in children]
    return [c.returncode for c in children], [t[0] for t in texts], [t[1] for t in texts]


def rows(workdir: Path, split: str = "train") -> dict[int, float]:
    """Returns the losses by step, each of which must stand once and in order."""
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    found = [(row["step"], row["loss"]) for row in lines if row["split"] == split]
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    return dict(found)


def wait_for_checkpoint(workdir: Path, step: int, children: list[Child]) -> None:
    """Waits until the run's checkpoint of `step` is whole."""
    wait_until((workdir / "checkpoints" / str(step)).exists, *children)


def wait_for_step(workdir: Path, step: int, children: list[Child]) -> None:
    """Waits until the run has logged `step`."""
    wait_until(lambda: max(rows(workdir), default=0) >= step, *children)
