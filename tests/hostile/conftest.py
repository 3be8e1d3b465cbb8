"""The harness: cases are rows of a table, run in the one warmed process of the test run.

    CASES = [
        Case("no such field", ["--config={}/c.py", "--config.nope=1"], says="unknown config field"),
        Case("empty tokenizer", ["--workdir={}/w"], {"w/tokenizer/tokenizer.json": b""}),
    ]

    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_train(case, holds):
        holds(train.main, case)

`{}` in an argument is the case's own folder, which is also the current one. Readers are fuzzed with
`mutated` bytes through `refused`, which lets only `BadInput` pass.
"""

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxgpt.system.errors import BadInput

LONGEST = 10.0  # seconds of this process's CPU time that a case may take
HANGS = 120.0  # seconds after which a case that waits for something is given up

# The same examples in every run; a busy machine breaks no deadline.
hypothesis.settings.register_profile(
    "hostile",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
FUZZ = hypothesis.settings.get_profile("hostile")


class Case(NamedTuple):
    """A row: what is given and how it may end.

    `files` are written below the case's folder first, by path: text, bytes, or a function that is
    called with the path. `says` stands in the error line. Exit code 1, a fault that nobody foresaw,
    is a failure unless `exits` allows it.
    """

    name: str
    argv: list[str]
    files: dict[str, "str | bytes | Callable[[Path], object]"] = {}
    says: str = ""
    exits: tuple[int, ...] = (0, 2)


def name_of(case: Case) -> str:
    """A case's name, as pytest's ids want it."""
    return case.name.encode("ascii", "backslashreplace").decode()


@pytest.fixture
def holds(command, tmp_path, monkeypatch):
    """Runs a case and checks how it ends: `holds(main, case) -> (exit code, stdout, stderr)`."""

    def call(main: Callable, case: Case) -> tuple[int, str, str]:
        folder = tmp_path / "case"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        write(folder, case.files)
        before = contents(folder)
        with in_time():
            code, out, err = command(main, *(a.replace("{}", str(folder)) for a in case.argv))
        check_end(code, out, err, case)
        if code:
            assert contents(folder) == before, "it failed and left something"
        return code, out, err

    return call


def write(folder: Path, files: dict) -> None:
    """Writes a case's files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def contents(folder: Path) -> dict[str, str]:
    """Returns what stands below `folder`: path -> digest, link target or kind."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def check_end(code: int, out: str, err: str, case: Case) -> None:
    """Asserts that a command ended as the contract says: one line for an error, no traceback."""
    assert "Traceback" not in out + err, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code in case.exits, f"exit {code}: {err}"
    assert len(errors) == (code in (1, 2)), err
    if code == 2:
        assert not out, "a refused command prints no result"
    assert case.says in (errors[0] if errors else err), err


@contextmanager
def in_time() -> Iterator[None]:
    """Asserts that the body takes no more than `LONGEST` CPU seconds, and does not hang."""

    def give_up(number, frame):
        pytest.fail(f"still running after {HANGS} s")

    can_interrupt = threading.current_thread() is threading.main_thread()
    began = time.process_time()
    if can_interrupt:
        previous = signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        yield
    finally:
        if can_interrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
    assert (took := time.process_time() - began) < LONGEST, f"took {took:.1f} s of CPU time"


def refused(read: Callable, *args, by: tuple[type[Exception], ...] = (BadInput,)) -> bool:
    """Says whether `read(*args)` refused its input with a message; any other exception passes on.

    `by` may add the reader's own exception, for example that of a damaged checkpoint.
    """
    try:
        read(*args)
    except by as e:
        assert str(e) and "\n" not in str(e)
        return True
    return False


def mutated(*valid: bytes) -> st.SearchStrategy[bytes]:
    """Draws damaged copies of `valid`: cut short, bits flipped, pieces overwritten, doubled,
    swapped for others, and bytes of no origin."""

    @st.composite
    def damaged(draw) -> bytes:
        data = bytearray(draw(st.sampled_from(valid)))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, max(len(data) - 1, 0)))
            end = draw(st.integers(at, min(len(data), at + 64)))
            match draw(st.sampled_from(("flip", "cut", "drop", "write", "double", "token"))):
                case "flip" if data:
                    data[at] ^= 1 << draw(st.integers(0, 7))
                case "cut":
                    del data[at:]
                case "drop":
                    del data[at:end]
                case "write":
                    data[at:end] = draw(st.binary(max_size=16))
                case "double":
                    data[end:end] = data[at:end]
                case "token":
                    data[at:end] = draw(st.sampled_from(TOKENS))
        return bytes(data)

    return st.one_of(damaged(), st.binary(max_size=64))


TOKENS = [
    *(b"null", b"[]", b"{}", b'""', b"true", b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"1.5"),
    *(b'"\\ud800"', b'"\\u0000"', b"\xff\xfe", b"\0", b"9" * 30, b"9" * 5000, b"[" * 2000),
    *(b"\x80" * 9, b"\xff" * 8, b"\n", b"../../x", b"/dev/zero", b"\xe2\x80\xa8"),
]
