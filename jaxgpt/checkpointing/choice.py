"""Which checkpoint a command uses: `--step`, the validation losses saved with each, the best.

Without --step that is the newest whole checkpoint; of a run that stopped early, the best.
"""

import math
from pathlib import Path

from absl import flags

from jaxgpt.system.files import Damaged, read_json

BEST = "best"
META = {
    "tokens": int,
    "seconds?": float,
    "validation_loss?": float,
    "validations?": [(int, float)],
    "skips?": [(int, int)],
    "rollbacks?": int,
    "data_fingerprint?": str,
    "config?": {"early_stop?": int},
    "versions?": dict,
    "environment?": dict,
    "data?": dict,
}


class _StepParser(flags.ArgumentParser):
    syntactic_help = f"a step or {BEST}"

    def parse(self, argument: str) -> int | str:
        if argument == BEST:
            return BEST
        try:
            return int(argument)
        except ValueError:
            raise ValueError(f"give a checkpoint's step, or {BEST}") from None


NEWEST = "the newest, of a run that stopped early the best"


def define_step(values: flags.FlagValues, default: str = NEWEST) -> None:
    """Adds `--step=N` or `--step=best`; `default` says what is used without it."""
    text = f"checkpoint, or {BEST}: of the least validation loss; default: {default}"
    flags.DEFINE(_StepParser(), "step", None, text, flag_values=values)


def read_meta(checkpoint) -> dict:
    """Returns what was saved beside the state in the folder `checkpoint`.

    Raises:
      Damaged: if it cannot be read.
    """
    return read_json(checkpoint / "meta" / "metadata", META)


def loss_of(checkpoint) -> float | None:
    """Returns the validation loss of the checkpoint in a folder, None if it has none or is
    damaged."""
    try:
        return loss_in(read_meta(checkpoint), int(Path(checkpoint).name))
    except Damaged:
        return None


def loss_in(meta: dict, step: int) -> float | None:
    """Returns the validation loss at `step` that its checkpoint's `meta` has, if there is one.

    Checkpoints of earlier versions have it only among the losses of all validations up to them.
    """
    return meta.get("validation_loss", dict(validations(meta)).get(step))


def validations(meta: dict) -> list[tuple[int, float]]:
    """Returns (step, loss) of every validation up to a checkpoint."""
    return [(step, loss) for step, loss in meta.get("validations", [])]


def best_of(found: list[tuple[int, float]]) -> tuple[int, float]:
    """Returns the (step, loss) of the least validation loss, the earliest of equals."""
    return min(found, key=lambda pair: pair[1], default=(0, math.inf))


def is_out_of_patience(found: list[tuple[int, float]], patience: int) -> bool:
    """Says whether the last `patience` validations (0: never) brought no better loss."""
    since = [step for step, _ in found if step > best_of(found)[0]]
    return 0 < patience <= len(since)


def has_stopped_early(meta: dict) -> bool:
    """Says whether the run whose newest checkpoint has this `meta` ended by early stopping."""
    patience = meta.get("config", {}).get("early_stop", 0)
    return is_out_of_patience(validations(meta), patience)
