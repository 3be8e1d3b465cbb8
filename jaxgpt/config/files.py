"""Writing a file in one piece."""

import os

from etils import epath


def write_whole(path: os.PathLike, text: str) -> None:
    """Writes `text` so that a reader, or a kill at any instant, finds the old file or the new."""
    path = epath.Path(path)
    scratch = path.parent / f".{path.name}.tmp"
    scratch.write_text(text)
    scratch.replace(path)
