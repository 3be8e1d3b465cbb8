"""The runs of a sweep, from the text of `--grid`."""

import copy
import hashlib
import math
import random
import re
from collections.abc import Callable

from jaxgpt.config import Config
from jaxgpt.config.schema import fields_of, set_field
from jaxgpt.config.validate import check_known
from jaxgpt.interchange.init_from import completed
from jaxgpt.system.errors import BadInput

Choice = dict[str, object]  # field path -> value
MOST_RUNS = 10_000
NAME_LENGTH = 100  # a folder's name must stay below 255 bytes


def parse_grid(text: str) -> dict[str, list]:
    """Returns field path -> values of `optim.learning_rate=1e-4,3e-4;batch_size=16,32`. Raises
    `BadInput` for an unknown field, a value of the wrong type, or no grid at all."""
    grid, known = {}, fields_of(Config())
    for assignment in filter(None, (a.strip() for a in text.split(";"))):
        path, _, values = assignment.partition("=")
        if not values:
            raise BadInput(f"--grid: {assignment!r} is not FIELD=VALUE,VALUE,...")
        check_known(path, known)
        if path in grid:
            raise BadInput(f"--grid names {path} twice")
        grid[path] = [_value(path, known[path], value.strip()) for value in values.split(",")]
        if len(set(grid[path])) < len(grid[path]):
            raise BadInput(f"--grid: {path} has a value twice")
    if not grid:
        raise BadInput("--grid=FIELD=VALUE,VALUE;FIELD=... is required")
    return grid


def _value(path: str, kind: type, text: str):
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise BadInput(f"--grid: {path}={text} is not true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except (ValueError, OverflowError) as e:
        raise BadInput(
            f"--grid: {path}={text} is not a valid value: expected {kind.__name__}"
        ) from e


def choices(grid: dict[str, list], how_many: int, seed: int) -> list[Choice]:
    """Returns every combination in order, or `how_many` > 0 of them drawn without repetition.
    Raises `BadInput` if that is more than `MOST_RUNS`."""
    total = math.prod(map(len, grid.values()))
    count = min(how_many, total) if how_many > 0 else total
    if count > MOST_RUNS:
        raise BadInput(
            f"--grid asks for {count} runs, more than {MOST_RUNS}: draw some with --random=K"
        )
    drawn = sorted(random.Random(seed).sample(range(total), count))
    return [_combination(grid, number) for number in drawn]


def _combination(grid: dict[str, list], number: int) -> Choice:
    """Returns combination `number`; the last field's value changes fastest."""
    choice = {}
    for path, values in reversed(grid.items()):
        number, index = divmod(number, len(values))
        choice[path] = values[index]
    return dict(reversed(choice.items()))


def apply_choice(
    config: Config, choice: Choice, check: Callable[[Config], object] = lambda config: None
) -> Config:
    """Returns a checked copy of `config` with the choice's values set. Raises `BadInput`, naming
    the combination, if it is not a possible run, or `check` refuses it."""
    try:
        config = copy.deepcopy(config)
        for path, value in choice.items():
            set_field(config, path, value)
        config = completed(config)
        check(config)
        return config
    except BadInput as e:
        raise BadInput(f"--grid: {name_of(choice)} is not a possible run: {e}") from e


def name_of(choice: Choice) -> str:
    """Returns a folder name for the choice: `learning_rate=0.001,batch_size=16`.

    If characters of a value cannot be in a name, a hash is added so that names stay distinct.
    """
    plain = ",".join(f"{path.split('.')[-1]}={value}" for path, value in choice.items())
    name = re.sub(r"[^\w=.,+-]", "_", plain)[:NAME_LENGTH]
    if name == plain:
        return name
    return f"{name}-{hashlib.sha256(repr(sorted(choice.items())).encode()).hexdigest()[:8]}"


def rungs(num_steps: int, count: int, eta: int) -> list[tuple[int, int]]:
    """Returns (steps, runs) of each rung of successive halving (arXiv:1502.07943, algorithm 1).

    `eta` = 3 keeps the best third of the runs and gives them three times the steps, until the last
    rung trains for `num_steps`; 0 trains all of them in full. Nine runs of 900 steps: 9 x 100,
    3 x 300, 1 x 900.
    """
    if eta < 2:
        return [(num_steps, count)]
    counts = [count]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // eta))
    last = len(counts) - 1
    return [(max(num_steps // eta ** (last - i), 1), runs) for i, runs in enumerate(counts)]
