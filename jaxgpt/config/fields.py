"""The fields of a config: what each may hold and what follows from it, in its metadata.

`range`, or a tuple of `choices`, says what a field may hold, which `validate` checks; `may_change`
whether a run may be resumed with another value; and, of the model's, what another value `changes`
and which other field it `needs` to have an effect.
"""

import dataclasses
from typing import NamedTuple

INT32 = 2**31 - 1  # steps, tokens and ids are counted in int32 on the devices
FLOAT32 = 3.4e38  # above it a float32 is infinite


class Range(NamedTuple):
    """The numbers from `low` to `high`, without either end if it is `open`ed: "(", ")" or "()"."""

    low: int | float
    high: int | float
    opened: str = ""

    def holds(self, value: int | float) -> bool:
        """Says whether `value` lies inside; NaN never does."""
        above = value > self.low if "(" in self.opened else value >= self.low
        return above and (value < self.high if ")" in self.opened else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low}" if "(" in self.opened else f"at least {self.low}"
        if self.high == FLOAT32:
            return f"{low} and finite"
        return f"{low} and {'below' if ')' in self.opened else 'at most'} {self.high}"


ANY_INT, ANY_FLOAT = Range(-INT32, INT32), Range(-FLOAT32, FLOAT32)


def number(default, low: int | float, high: int | float | None = None, opened: str = ""):
    """Returns a field for numbers from `low` to `high` (default: what an int32 or a float32
    holds)."""
    high = high if high is not None else INT32 if type(default) is int else FLOAT32
    return dataclasses.field(default=default, metadata={"range": Range(low, high, opened)})


def choice(default: str, *others: str):
    """Returns a field for `default` or one of `others`."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


def may_change(field):
    """Returns a field, or one of this default, that a resumed run may have another value of."""
    return _with(field, may_change=True)


def changes(what: str, field):
    """Returns a model's field, or one of this default, that does not change the function that the
    parameters stand for, but its "domain" (which ids and positions it takes), the "parameters" (how
    many arrays hold it) or the "training"."""
    return _with(field, changes=what)


def needs(name: str, *values, field):
    """Returns a model's field, or one of this default, without effect unless the field `name` has
    one of `values`."""
    return _with(field, needs=(name, values))


class Axis(NamedTuple):
    """What the devices along a mesh axis split: the batch or not, and which logical axes of the
    parameters (see `parallel.rules`)."""

    batch: bool
    logical: tuple[str, ...]


def axis(default: int, *logical: str, batch: bool = False):
    """Returns the field of a mesh axis."""
    return _with(default, may_change=True, axis=Axis(batch, logical))


def _with(field, **metadata):
    if not isinstance(field, dataclasses.Field):
        field = dataclasses.field(default=field)
    return dataclasses.field(default=field.default, metadata=field.metadata | metadata)
