"""Which checkpoint a command uses: `--step`, and the validation losses saved with checkpoints."""

import math
from pathlib import Path

from absl import flags
from etils import epath

from jaxgpt.config.stored import read_config
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged, read_json
from jaxgpt.system.stores import check_store

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
        try:
            return BEST if argument == BEST else int(argument)
        except ValueError:
            raise ValueError(f"expected a checkpoint's step, or {BEST}") from None


def check_run(workdir: str, step: int | str | None) -> None:
    """Raises `BadInput` if `workdir` holds no run, or no checkpoint at `step`. This is quick: the
    weights are not looked at, and JAX is not imported."""
    folder = epath.Path(workdir)
    read_config(folder)
    check_checkpoints(folder)
    if isinstance(step, int) and not (folder / "checkpoints" / str(step)).exists():
        names = [path.name for path in (folder / "checkpoints").iterdir()]
        steps = sorted(int(name) for name in names if name.isdecimal())
        raise BadInput(f"{folder}/checkpoints holds no checkpoint {step}, only {steps}")


def check_checkpoints(folder: epath.Path) -> None:
    """Raises `BadInput` if a workdir has no folder of checkpoints."""
    check_store(folder)
    if not (folder / "checkpoints").exists():
        raise BadInput(f"{folder} has no checkpoints; train first")


def define_step(
    values: flags.FlagValues, default: str = "the newest, or the best of a run that stopped early"
) -> None:
    """Adds `--step=N` or `--step=best`; `default` says what is used without it."""
    text = f"checkpoint, or {BEST}: the one with the lowest validation loss; default: {default}"
    flags.DEFINE(_StepParser(), "step", None, text, flag_values=values)


def read_meta(checkpoint) -> dict:
    """Returns what was saved beside the state in the folder `checkpoint`. Raises `Damaged` if it
    cannot be read."""
    return read_json(checkpoint / "meta" / "metadata", META)


def loss_of(checkpoint) -> float | None:
    """Returns the validation loss of the checkpoint in a folder, None if it has none to read."""
    try:
        return loss_in(read_meta(checkpoint), int(Path(checkpoint).name))
    except Damaged:
        return None


def loss_in(meta: dict, step: int) -> float | None:
    """Returns the validation loss in the `meta` of the checkpoint at `step`, if there is one.

    Earlier versions wrote it only into the list of all validations so far.
    """
    return meta.get("validation_loss", dict(validations(meta)).get(step))


def validations(meta: dict) -> list[tuple[int, float]]:
    """Returns the (step, loss) of each validation up to a checkpoint."""
    return [(step, loss) for step, loss in meta.get("validations", [])]


def best_of(validations: list[tuple[int, float]]) -> tuple[int, float]:
    """Returns the (step, loss) of the lowest loss, of equal ones the earliest."""
    return min(validations, key=lambda pair: pair[1], default=(0, math.inf))


def is_out_of_patience(validations: list[tuple[int, float]], patience: int) -> bool:
    """Says whether none of the last `patience` validations had a new best loss; 0: never."""
    since = [step for step, _ in validations if step > best_of(validations)[0]]
    return 0 < patience <= len(since)


def has_stopped_early(meta: dict) -> bool:
    """Says whether the run whose newest checkpoint has this `meta` ended by early stopping."""
    return is_out_of_patience(validations(meta), meta.get("config", {}).get("early_stop", 0))
