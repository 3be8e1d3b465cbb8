"""The exceptions that end a command with one line."""

import difflib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

LONGEST = 2000  # characters of a message: an input that is quoted may be of any length


class BadInput(Exception):
    """Bad input: the message is one line saying what is wrong, where, and what to do.

    Commands print it as `error: <message>` on stderr and exit with code 2.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class PeerLost(Exception):
    """Another process of the run has gone; running the command again resumes. Exit code 1."""


@contextmanager
def as_bad_input(describe: Callable[[BaseException], str]) -> Iterator[None]:
    """Raises what a library raises in the body as `BadInput(describe(error))`.

    For libraries that raise anything over a damaged file: bare `Exception`, or panics of Rust code,
    which are no `Exception`.
    """
    try:
        yield
    except (BadInput, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as e:
        raise BadInput(describe(e)) from e


def one_line(message: object) -> str:
    """Returns a message as one printable line: control characters and surrogates are escaped, what
    is longer than `LONGEST` loses its middle."""
    text = " ".join(str(message).split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Returns `; did you mean NEAREST?` for the end of a message; '' if none in `known` is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def described(e: BaseException) -> str:
    """Returns an exception's type and message, also if `str` of it fails."""
    try:
        return f"{type(e).__name__}: {e}"
    except Exception:
        return type(e).__name__
