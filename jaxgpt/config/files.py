"""Writing a file, or a folder, in one piece."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from jaxgpt.config.errors import BadInput


@contextmanager
def whole_folder(target: Path, flag: str) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its name if the body succeeds.

    Raises:
      BadInput: now, if `target` holds something (`flag` names another); at the end, if it cannot
        be written. Nothing is left behind then.
    """
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise BadInput(f"{target} exists already; choose another {flag}")
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if target.is_dir():
            target.rmdir()
        scratch.rename(target)
    except OSError as e:
        raise BadInput(f"cannot write {target}: {e}") from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_whole(path: os.PathLike, text: str) -> None:
    """Writes `text` so that a reader, or a kill at any instant, finds the old file or the new."""
    path = epath.Path(path)
    scratch = path.parent / f".{path.name}.tmp"
    scratch.write_text(text)
    scratch.replace(path)
