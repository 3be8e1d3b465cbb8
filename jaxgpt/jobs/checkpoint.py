"""What a run's checkpoints hold, printed."""

import json

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.checkpointing.manifest import size_of
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput


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
    if damage := checkpoints.damage(step):
        return row | {"damage": damage}
    row["tokens"], row["loss"] = checkpoints.meta(step)["tokens"], checkpoints.loss(step)
    return row | {"bytes": size_of(checkpoints.folder / str(step)), "damage": ""}


def show(checkpoints: Checkpoints, step: int | None) -> None:
    """Prints metadata and arrays of one checkpoint (default: the one that `sample` uses)."""
    step, arrays = checkpoints.pick(step), {}
    for path, leaf in checkpoints.arrays(step).items():
        arrays[path] = [list(leaf.shape), str(leaf.dtype)]
        say(f"{path}: {leaf.dtype}{list(leaf.shape)}")
    row = describe(checkpoints, step)
    print(json.dumps(row | {"meta": checkpoints.meta(step), "arrays": arrays}))


def verify(checkpoints: Checkpoints, step: int | None) -> None:
    """Compares checkpoints (default: all) with their manifests. Raises `BadInput`, naming the first
    that is damaged, and what is wrong."""
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise BadInput(f"{checkpoints.folder} holds no checkpoint {step}, only {steps}")
    whole, damaged = [], {}
    for s in steps if step is None else [step]:
        if fault := checkpoints.damage(s):
            damaged[s] = fault
        else:
            whole.append(s)
        say(f"step {s}: {fault or 'whole'}")
    print(json.dumps({"whole": whole, "damaged": damaged}))
    if damaged:
        s, fault = next(iter(damaged.items()))
        raise BadInput(f"checkpoint {s} in {checkpoints.folder} is damaged: {fault}")


ACTIONS = {"list": list_all, "show": show, "verify": verify}
