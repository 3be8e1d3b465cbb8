"""Object stores: what differs from a file system."""

import os


def is_object_store(path) -> bool:
    """Says whether `path` is a URL, like `gs://bucket/run`, rather than a file system's path.

    An object store has no renaming, no appending, no locks and no folders without files.
    """
    return "://" in os.fspath(path)
