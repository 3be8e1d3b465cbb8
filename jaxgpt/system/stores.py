"""Object stores, `gs://` and `s3://`.

Files go through etils.epath and fsspec (its packages gcsfs and s3fs), arrays of checkpoints through
TensorStore. An object store cannot rename, append or lock and has no empty folders; a file appears
when all of it is written.
"""

import os
import shutil

from etils import epath

from jaxgpt.system.errors import BadInput, described, one_line
from jaxgpt.system.extras import require

# What a store that cannot be reached raises: its packages' own exceptions, and TensorStore's words.
FROM = ("botocore.", "aiobotocore.", "aiohttp.", "gcsfs.", "google.", "requests.", "urllib3.")
WORDS = ("UNAVAILABLE", "CURL error", "Connection refused", "Could not connect", "Connect timeout")
PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # fsspec's package, our extra


def is_object_store(path) -> bool:
    """Says whether `path` is a URL, like `gs://bucket/run`, rather than a file system's path."""
    return "://" in os.fspath(path)


def absolute(path) -> epath.Path:
    """Returns `path` as an absolute path; a URL, which `epath.absolute` would break, as it is."""
    return epath.Path(path) if is_object_store(path) else epath.Path(path).absolute()


def check_store(path) -> None:
    """Raises `BadInput` if `path` is a URL that cannot be reached; call it before other uses."""
    url = os.fspath(path)
    if not is_object_store(path) or url in _reached:
        return
    scheme = url.partition("://")[0]
    if scheme not in PACKAGES:
        raise BadInput(f"{url}: choose a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
    require(*PACKAGES[scheme], url)
    import fsspec

    # TensorStore writes without fsspec's knowledge, so a cached listing would be out of date
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    try:
        epath.Path(url).exists()
    except Exception as e:  # each store raises its own
        raise BadInput(f"{url} cannot be reached: {e}") from e
    _reached.append(url)


_reached: list[str] = []  # the URLs that this process uses


def outage(e: BaseException) -> str:
    """Returns the line for an object store that fails though it was reachable, '' if that is not
    what `e` or a cause of it says. A store that refuses, or lacks the file, has answered."""
    if not _reached:
        return ""
    cause: BaseException | None = e
    while cause is not None and not isinstance(cause, FileNotFoundError | PermissionError):
        own = type(cause).__module__.startswith(FROM) or isinstance(cause, ConnectionError)
        if own or any(word in str(cause) for word in WORDS):
            return (
                f"the object store of {_reached[0]} does not answer any more"
                f" ({one_line(described(cause))[:300]}); run the same command again to resume"
            )
        cause = cause.__cause__ or cause.__context__
    return ""


def read_bytes(path) -> bytes:
    """Returns a file's bytes as of one moment, though another process may be replacing the file.

    On an object store that takes a single request: fsspec's `open` asks for the size and the bytes
    separately.
    """
    if not is_object_store(path):
        return epath.Path(path).read_bytes()
    import fsspec

    store, name = fsspec.core.url_to_fs(os.fspath(path))
    return store.cat_file(name)


def check_store_writable(url) -> None:
    """Raises `BadInput` if nothing can be written below `url`."""
    check_store(url)
    probe = epath.Path(url) / f".writable-{os.uname().nodename}-{os.getpid()}"
    try:
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except Exception as e:
        raise BadInput(f"{url} cannot be written: {e}") from e


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder to an unused path; on an object store file by file."""
    if not is_object_store(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        return
    copy_folder(source, target)
    source.rmtree()


def copy_folder(source, target, last: str = "", without: tuple[str, ...] = ()) -> None:
    """Copies a folder's files, except those in `without`; the file `last` comes last."""
    source, target = epath.Path(source), epath.Path(target)
    names = [name for name in files_of(source) if name not in without]
    for name in sorted(names, key=lambda name: (name == last, name)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as read, (target / name).open("wb") as write:
            shutil.copyfileobj(read, write, 16 << 20)


def files_of(folder: epath.Path) -> list[str]:
    """Returns the paths of all files below `folder`, relative to it."""
    names = []
    for path in sorted(folder.iterdir()):
        inner = [f"{path.name}/{name}" for name in files_of(path)] if path.is_dir() else [path.name]
        names += inner
    return names
