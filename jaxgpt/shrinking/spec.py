"""`--method` and its flags, checked before JAX is imported.

Methods compose in the order of their stages, whatever trains in between: distil (an objective of
`train`), heads, prune, svd, tt, then int8, int4 or nf4. What was done is `methods_done` of
config.json.
"""

import dataclasses
from typing import NamedTuple

from jaxgpt.config import Config
from jaxgpt.config.fields import Range
from jaxgpt.config.validate import LORA_TARGETS
from jaxgpt.system.errors import BadInput, did_you_mean

GROUPS = (0, 32, 64, 128)
WINDOWS = 32  # of calibration
KEEP = (*LORA_TARGETS, "head", "positions")


class Method(NamedTuple):
    """When a method may run, and what follows its name after a colon."""

    stage: int
    repeats: bool = False  # may follow a method of its own stage
    argument: type | None = None
    range: Range | None = None
    what: str = ""


KINDS = {
    "heads": Method(1, True, float, Range(0, 1, "()"), "the share of heads and MLP columns"),
    "layers": Method(1, True, float, Range(0, 1, "()"), "the share of layers"),
    "prune": Method(2, True, float, Range(0, 1, "()"), "the share of zeros"),
    "prune24": Method(2),
    "svd": Method(
        3, False, float, Range(0, 2**16, "("), "the rank of each projection, or below 1 its energy"
    ),
    "tt": Method(4, False, int, Range(1, 2**16), "the rank of the embeddings' tensor train"),
    "int8": Method(5),
    "int4": Method(5),
    "nf4": Method(5),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say: `calibration` is the number of windows of training text to measure with,
    0 for methods that use none; `data` where the run has no text of its own."""

    group: int
    keep: str
    calibration: int
    data: str = ""
    targets: str = ""  # of svd: lora's targets; all where it is empty


def parse_method(text: str) -> tuple[str, float | int | None]:
    """Returns the name and the argument of `--method`. Raises `BadInput` if there is no such
    method, or the argument is missing, out of range or too much."""
    name, colon, value = text.partition(":")
    if name not in KINDS:
        near = did_you_mean(name, KINDS) or f"; choose {', '.join(KINDS)}"
        raise BadInput(f"--method={text} is unknown{near}")
    method = KINDS[name]
    if method.argument is None:
        if colon:
            raise BadInput(f"--method={text}: {name} takes no argument")
        return name, None
    try:
        number = method.argument(value)
    except ValueError:
        raise BadInput(f"--method={text}: write {name}:NUMBER, {method.what}") from None
    if not method.range.holds(number):
        raise BadInput(f"--method={text}: {method.what} must be {method.range}")
    if name == "svd" and number > 1 and number % 1:
        raise BadInput(f"--method={text}: a rank is a whole number, a share of energy below 1")
    return name, number


def check_order(done: str, name: str, workdir: str) -> None:
    """Raises `BadInput` if the method `name` cannot follow those in `done`."""
    before = [text.partition(":")[0] for text in done.split()]
    method = KINDS[name]
    for earlier in before:
        stage = KINDS[earlier].stage if earlier in KINDS else 0
        if stage > method.stage or (stage == method.stage and not method.repeats):
            raise BadInput(
                f"{workdir} was shrunk already ({done}); {name} cannot follow {earlier}:"
                f" the order is {', '.join(KINDS)}"
            )


def parse_options(
    config: Config,
    name: str,
    group: int | None,
    keep: str | None,
    calibration: int | None,
    data: str,
    targets: str,
) -> Options:
    """Returns the checked flags of the method `name` for a run of this config: what was trained to
    be rounded (`compute.fake_quantise`) is by default rounded so. Raises `BadInput`."""
    was_rounded = config.compute.fake_quantise == name
    if group is None:
        group = was_rounded and config.shrink.group or (0 if name == "int8" else 32)
    if keep is None:
        keep = config.shrink.keep if was_rounded else ""
    if calibration is None:
        calibration = 0 if was_rounded else WINDOWS
    if group not in GROUPS:
        raise BadInput(f"--group={group} must be one of {', '.join(map(str, GROUPS))}")
    if unknown := set(filter(None, keep.split(","))) - set(KEEP):
        raise BadInput(f"--keep={keep}: {sorted(unknown)[0]!r} is none of {', '.join(KEEP)}")
    if unknown := set(filter(None, targets.split(","))) - set(LORA_TARGETS):
        raise BadInput(
            f"--targets={targets}: {sorted(unknown)[0]!r} is none of {', '.join(LORA_TARGETS)}"
        )
    if calibration < 0:
        raise BadInput(f"--calibration={calibration} must be at least 0")
    return Options(group, keep, calibration, data, targets)
