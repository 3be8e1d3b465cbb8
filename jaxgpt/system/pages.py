"""Huge pages for what this process allocates, and what it gives back.

XLA on a CPU allocates a program's temporaries for every step and returns them to the system, which
hands them out again page by page: in pages of 4 KiB, a fifth of a small model's time. glibc asks
for huge pages where a tunable says so, which it reads only as a process starts.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES = "GLIBC_TUNABLES"
HUGE = "glibc.malloc.hugetlb=1"
SINCE = (2, 35)  # the glibc that knows the tunable


def use_huge_pages() -> None:
    """Starts this command again, as the same process, so that glibc allocates huge pages.

    Does nothing where that is of no use: without glibc, where the system gives huge pages to all or
    to none, or if the user has set tunables. Nothing else must have been done before, as it
    would be done twice. A process of another program, a test or a debugger, is left as it is.
    """
    if TUNABLES in os.environ or not _is_command() or not _on_request():
        return
    try:
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {TUNABLES: HUGE}
        )
    except OSError:
        pass  # slower, but no less right


def return_free_memory() -> None:
    """Gives the system what this process has freed: a compiler's hundreds of MB, for example, which
    glibc keeps. Does nothing under another C library."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _is_command() -> bool:
    """Says whether this process was started by `python -m jaxgpt.COMMAND`, `python -m jaxgpt` or
    the script `jaxgpt`."""
    arguments, program = sys.orig_argv, getattr(sys.modules["__main__"], "__spec__", None)
    if program is None:
        return Path(sys.argv[0]).name == "jaxgpt" and sys.argv[0] in arguments
    name = program.name.removesuffix(".__main__")
    module = arguments[arguments.index("-m") + 1 :][:1] if "-m" in arguments else []
    return name.partition(".")[0] == "jaxgpt" and module == [name]


def _on_request() -> bool:
    """Says whether huge pages go to those who ask, and glibc can."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        has_tunable = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= SINCE
        return has_tunable and "[madvise]" in HUGE_PAGES.read_text()
    except (ValueError, OSError):  # no such name: another C library; no such file: another kernel
        return False
