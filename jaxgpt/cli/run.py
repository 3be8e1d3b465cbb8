"""How every command starts and ends: one line for each error, exit codes 0 to 3 or 128 + signal."""

import errno
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from logging import CRITICAL, getLogger

from absl import logging

from jaxgpt.system.accelerators import leave_out_absent
from jaxgpt.system.errors import BadInput, PeerLost, described, one_line
from jaxgpt.system.pages import use_huge_pages
from jaxgpt.system.programs import keep_programs
from jaxgpt.system.stores import outage

GRACE = 5.0  # seconds for threads to end by themselves after an error
# What the system refuses because of the path, the permissions or the space that it was given.
FULL = (errno.EDQUOT, errno.ENOSPC)
REFUSED = (
    *(*FULL, errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOTDIR, errno.EPERM, errno.EROFS),
)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command and ends the process: 0 done, 2 bad input, 1 any other fault, 3 diverged,
    128 + number after a signal."""
    use_huge_pages()
    logging.set_verbosity(logging.FATAL)  # what libraries log of an error, they also raise
    for library in ("asyncio", "gcsfs"):
        getLogger(library).setLevel(CRITICAL)
    leave_out_absent()
    keep_programs()
    sys.unraisablehook = _no_closed_loops
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments: see `check_text`
    try:
        code = main(sys.argv) or 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT  # outside the training loop there is nothing to save
    except BrokenPipeError:  # `... | head`: the reader has gone, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as e:
        code, line = code_and_message(e)
        print(f"error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (1, 2) and (_is_distributed() or _is_held()):
        os._exit(code)  # the interpreter's own end would wait for other processes, or threads
    sys.exit(code)


def code_and_message(e: Exception) -> tuple[int, str]:
    """Returns the exit code and the message of an exception that ends a command.

    Bad input is 2, as is what the system refuses for its path, permissions or space. An object
    store that fails, or a process that is gone, is 1, and no fault of ours. So is what no check
    foresaw, whose traceback goes to a file that the message names.
    """
    if isinstance(e, OSError) and e.errno in REFUSED:
        where = "".join(f"{name}: " for name in (e.filename, e.filename2) if name)
        remedy = "; make room and run the same command again" if e.errno in FULL else ""
        return 2, one_line(f"{where}{e.strerror or e}{remedy}")
    if not isinstance(e, PeerLost) and (lost := outage(e)):
        return 1, lost  # also where the input was refused, which a store accepted before
    if isinstance(e, BadInput | PeerLost):
        return 2 if isinstance(e, BadInput) else 1, str(e)
    what = one_line(described(e))[:500]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="jaxgpt-", suffix=".txt", delete=False, errors="backslashreplace"
        ) as file:
            file.write(f"{sys.argv!a}\n")
            traceback.print_exception(e, file=file)
    except OSError as failed:
        return 1, f"{what} (a fault of jaxgpt; its traceback cannot be written: {failed})"
    return 1, f"{what} (a fault of jaxgpt; the traceback is in {file.name})"


def _is_distributed() -> bool:
    jax = sys.modules.get("jax")  # if nobody has imported it, nothing is
    return jax is not None and jax.distributed.is_initialized()


def _is_held() -> bool:
    """Says whether Orbax would keep a command from ending: the threads of a save that failed wait
    many minutes for signals that nobody sends. Those of a save that goes well end within `GRACE`.
    """
    program = getattr(sys.modules["__main__"], "__spec__", None)
    if program is None or not program.name.startswith("jaxgpt."):
        return False  # the process is not ours to end
    threads = [t for t in threading.enumerate() if type(t).__module__.startswith("orbax.")]
    until = time.monotonic() + GRACE
    for thread in threads:
        # not thread.join: Orbax's raises what ended the thread, and TimeoutError
        threading.Thread.join(thread, max(0.0, until - time.monotonic()))
    return any(thread.is_alive() for thread in threads)


def _no_closed_loops(unraisable) -> None:
    """Leaves out what TensorStore prints of writes that ended after Orbax stopped waiting for them
    (as `run` does with its warnings): the failed write itself is raised.
    """
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)
