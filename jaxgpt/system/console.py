"""Lines for people, on stderr."""

import sys

_speaks = True


def silence() -> None:
    """Makes `say` print nothing from here on: what people read comes from one process."""
    global _speaks
    _speaks = False


def say(text: str, end: str = "\n") -> None:
    """Prints a line for people: stderr, at once."""
    if _speaks:
        print(text, end=end, file=sys.stderr, flush=True)
