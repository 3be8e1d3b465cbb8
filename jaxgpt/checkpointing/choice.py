"""Which checkpoint a command uses: `--step`, the validation losses saved with each, the best.

Without --step that is the newest whole checkpoint; of a run that stopped early, the best.
"""

import math
from pathlib import Path

from absl import flags

from jaxgpt.config.files import Damaged, read_json

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
    """Returns the validation loss of the checkpoint in a folder, None if it has none or is damaged.

    Checkpoints of earlier versions have it only among the losses of all validations up to them.
    """
    try:
        meta = read_meta(checkpoint)
    except Damaged:
        return None
    earlier = dict(map(tuple, meta.get("validations", [])))
    return meta.get("validation_loss", earlier.get(int(Path(checkpoint).name)))


def best_of(validations: list[tuple[int, float]]) -> tuple[int, float]:
    """Returns the (step, loss) of the least validation loss, the earliest of equals."""
    return min(validations, key=lambda found: found[1], default=(0, math.inf))


def is_out_of_patience(validations: list[tuple[int, float]], patience: int) -> bool:
    """Says whether the last `patience` validations (0: never) brought no better loss."""
    since = [step for step, _ in validations if step > best_of(validations)[0]]
    return 0 < patience <= len(since)


def has_stopped_early(meta: dict) -> bool:
    """Says whether the run whose newest checkpoint has this `meta` ended by early stopping."""
    patience = meta.get("config", {}).get("early_stop", 0)
    return is_out_of_patience(meta.get("validations", []), patience)
