"""Compiled programs are kept on disk, so that the second run of a config starts at once.

JAX's own cache does the work. Its size limit would stop working after a process was killed while
writing, so that the limit is applied here, when a command starts.
"""

import hashlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

FOLDER = "JAX_COMPILATION_CACHE_DIR"
MIN_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
LIMIT = 2 * 2**30  # bytes
MESSAGE = "persistent compilation cache"  # in each warning that JAX gives about it


def keep_programs() -> None:
    """Keeps compiled programs in `programs/` under $JAXGPT_CACHE or ~/.cache/jaxgpt; call it before
    JAX is imported.

    $JAX_COMPILATION_CACHE_DIR names another folder, of which the user takes care. Does nothing
    where nothing can be written.
    """
    if FOLDER in os.environ:
        return
    try:
        cache = Path(os.environ.get("JAXGPT_CACHE") or "~/.cache/jaxgpt").expanduser() / "programs"
        folder = cache / processor()
        folder.mkdir(parents=True, exist_ok=True)
        remove_oldest(cache, LIMIT)
    except (OSError, RuntimeError):  # no home, or not ours to write in
        return
    os.environ[FOLDER] = str(folder)
    os.environ.setdefault(MIN_SECONDS, "0.1")
    warnings.showwarning = _without_cache_warnings(folder, warnings.showwarning)


def keep_no_programs() -> None:
    """Undoes `keep_programs`: what is compiled from now on is neither read nor written."""
    jax = sys.modules["jax"]
    if Path(jax.config.jax_compilation_cache_dir or "").parent.name == "programs":
        jax.config.update("jax_compilation_cache_dir", None)


def processor() -> str:
    """Returns a name for processors that run the same programs: JAX's keys do not tell them apart,
    and hosts may share a home."""
    flags = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):  # not Linux
        pass
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def remove_oldest(folder: Path, limit: int) -> None:
    """Deletes the files in `folder` that were written first, until the rest has `limit` bytes."""
    files = []
    for entry in folder.rglob("*"):
        try:
            if entry.is_file():
                stat = entry.stat()
                files.append((stat.st_mtime_ns, stat.st_size, entry))
        except FileNotFoundError:  # another process was first
            continue
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= limit:
            return
        file.unlink(missing_ok=True)
        total -= size


def _without_cache_warnings(folder: Path, show: Callable) -> Callable:
    """Returns what shows warnings, except those about the cache: a full disk costs only time, and
    an entry that cannot be read, as its writer was killed, goes with the others."""

    def showwarning(message, category, filename, lineno, file=None, line=None):
        if MESSAGE not in str(message):
            show(message, category, filename, lineno, file, line)
        elif "reading" in str(message):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)

    return showwarning
