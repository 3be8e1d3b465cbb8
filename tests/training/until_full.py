"""A program for the tests of full disks: saves three checkpoints, or imports weights, into a
folder.

    python -m tests.training.until_full save|import FOLDER

It ends as a command does: in `cli.run`, which leaves the threads of other programs alone.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp

from jaxgpt.checkpointing.checkpoints import Checkpoints, save_weights
from jaxgpt.cli import run as cli
from jaxgpt.system.files import whole_folder

STATE = {f"a{i}": jnp.ones((100, 100)) for i in range(10)}  # 40 KB each


def main(argv: list[str]) -> None:
    if argv[1] == "import":
        with whole_folder(Path(argv[2]) / "imported", "--workdir") as scratch:
            save_weights(scratch, STATE, {"tokens": 0})
        return
    checkpoints = Checkpoints(argv[2], keep=1)
    for step in range((checkpoints.newest_whole() or 0) + 1, 4):
        checkpoints.save(step, STATE, {"tokens": step})
        time.sleep(0.2)  # the save goes on while a run would train
    checkpoints.close()


if __name__ == "__main__":
    sys.modules["__main__"].__spec__ = SimpleNamespace(name="jaxgpt.until_full")
    cli.run(main)
