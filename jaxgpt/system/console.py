"""Messages to the user, on stderr."""

import sys

_prints = True


def silence() -> None:
    """Makes `say` print nothing from now on: only one process of a run prints messages."""
    global _prints
    _prints = False


def say(text: str, end: str = "\n") -> None:
    """Prints a message to the user on stderr and flushes it."""
    if _prints:
        print(text, end=end, file=sys.stderr, flush=True)
