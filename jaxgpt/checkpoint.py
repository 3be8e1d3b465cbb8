"""What is in a run's checkpoints, and whether it is whole:

    python -m jaxgpt.checkpoint list --workdir=DIR
    python -m jaxgpt.checkpoint show --workdir=DIR [--step=N|best]
    python -m jaxgpt.checkpoint verify --workdir=DIR [--step=N|best]

`list` has a row for each checkpoint, `show` everything of one but its arrays' values, `verify`
compares every file with its checksum and exits with 2 if one differs. The last line is JSON.
"""

import json

from absl import flags

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.checkpointing.choice import BEST, define_step
from jaxgpt.checkpointing.manifest import size_of
from jaxgpt.cli.flags import parse
from jaxgpt.cli.run import run
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput

ACTIONS = ("list", "show", "verify")


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "folder of the run", flag_values=values)
    define_step(values, "see above")
    action = argv[1] if len(argv) > 1 else ""
    if action not in ACTIONS and not any(arg.endswith(("-h", "-help")) for arg in argv):
        raise BadInput(f"say what to do: jaxgpt.checkpoint {'|'.join(ACTIONS)} --workdir=DIR")
    parse(values, [argv[0], *argv[2:]] if action in ACTIONS else argv, __doc__)
    if not values.workdir:
        raise BadInput("--workdir=DIR is required")
    checkpoints = Checkpoints(values.workdir, read_only=True)
    step = checkpoints.pick(BEST) if values.step == BEST else values.step
    {"list": list_all, "show": show, "verify": verify}[action](checkpoints, step)


def list_all(checkpoints: Checkpoints, step: int | None) -> None:
    """Prints a row per checkpoint: step, tokens, loss, bytes, damage, and which is the best."""
    rows = [describe(checkpoints, s) for s in checkpoints.steps()]
    whole = {row["step"] for row in rows if not row["damage"]}
    best = next((s for s in checkpoints.by_loss() if s in whole), None)
    rows = [row | {"best": row["step"] == best} for row in rows if step in (None, row["step"])]
    for row in rows:
        loss = "" if row["loss"] is None else f" | validation loss {row['loss']:.4f}"
        state = (row["damage"] or "whole") + (" | best" if row["best"] else "")
        tokens, size = row["tokens"] or 0, row["bytes"] or 0
        say(f"step {row['step']} | {tokens:,} tokens{loss} | {size:,} bytes | {state}")
    print(json.dumps(rows))


def describe(checkpoints: Checkpoints, step: int) -> dict:
    """Returns `step`, `tokens`, `loss`, `bytes` and `damage`; None for what cannot be read."""
    row = {"step": step, "tokens": None, "loss": None, "bytes": None}
    row["damage"] = checkpoints.damage(step)
    if not row["damage"]:
        row["tokens"], row["loss"] = checkpoints.meta(step)["tokens"], checkpoints.loss(step)
        row["bytes"] = size_of(checkpoints.folder / str(step))
    return row


def show(checkpoints: Checkpoints, step: int | None) -> None:
    """Prints what one checkpoint (default: that which `sample` uses) holds, array by array."""
    step = checkpoints.pick(step)
    arrays = {
        path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in checkpoints.arrays(step).items()
    }
    for path, (shape, dtype) in arrays.items():
        say(f"{path}: {dtype}{shape}")
    found = describe(checkpoints, step) | {"meta": checkpoints.meta(step), "arrays": arrays}
    print(json.dumps(found))


def verify(checkpoints: Checkpoints, step: int | None) -> None:
    """Compares checkpoints (default: all) with their manifests.

    Raises:
      BadInput: naming the first that is damaged, and what is wrong.
    """
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise BadInput(f"{checkpoints.folder} holds no checkpoint {step}, only {steps}")
    faults = {s: checkpoints.damage(s) for s in steps if step in (None, s)}
    for number, fault in faults.items():
        say(f"step {number}: {fault or 'whole'}")
    damaged = {number: fault for number, fault in faults.items() if fault}
    print(json.dumps({"whole": [s for s in faults if s not in damaged], "damaged": damaged}))
    if damaged:
        number, fault = next(iter(damaged.items()))
        raise BadInput(f"checkpoint {number} in {checkpoints.folder} is damaged: {fault}")


if __name__ == "__main__":
    run(main)
