"""Folders that are written once and whole, by one process at a time, and checked when read."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from jaxgpt.data.shards import META
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import locked, remove_any, whole_folder

T = TypeVar("T")


def load_or_write(
    folder: Path, locks: Path, write: Callable[[Path], None], read: Callable[[Path], T]
) -> T:
    """Returns `read(folder)`. If the folder is not there, or `read` finds it damaged (which is said
    in one line), it is first made by `write(scratch)` and renaming scratch to it.

    Processes that want the same folder wait for one another; what a killed one left is removed. An
    interrupted one says that it leaves nothing.

    Raises:
      BadInput: if nothing can be written there (no permission, disk full, a path below a file).
    """
    if os.path.lexists(folder):
        try:
            return read(folder)
        except BadInput as e:
            say(f"data      {e}; it is made anew")
    name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
    waiting = f"data      waiting for another process that is writing {folder}"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        with locked(locks / name, lambda: say(waiting)) as is_locked:
            with suppress(BadInput):  # another process may have made it meanwhile
                return read(folder)
            remove_any(folder)
            try:
                with whole_folder(folder, "folder", is_locked) as scratch:
                    write(scratch)
            except (KeyboardInterrupt, SystemExit):
                say("stopped   what was prepared so far is not kept: the next run starts clean")
                raise
            except BadInput:  # on a file system without locks another host may have been first
                if is_locked or not (folder / META).exists():
                    raise
    except OSError as e:
        raise BadInput(f"cannot write {folder}: {e}") from e
    return read(folder)
