"""Reading and writing whole files: the small JSON files that jaxgpt keeps, and folders."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from jaxgpt.system.errors import BadInput
from jaxgpt.system.stores import read_bytes

DEEPEST = 100  # nested levels of a JSON value; ours have at most six
NUMBERS = 1 << 63  # integers are below it in magnitude
NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number"}
NAMES |= {bool: "true or false", type(None): "null"}


class Damaged(BadInput):
    """A stored file that cannot be used: `path` and `why`."""

    state = "is damaged: "

    def __init__(self, path: os.PathLike, why: str, remedy: str = ""):
        super().__init__(f"{path} {self.state}{why}" + (f"; {remedy}" if remedy else ""))
        self.path, self.why = path, why


class Missing(Damaged):
    """A stored file that is not there."""

    state = ""


def read_json(path: os.PathLike, schema: Any = object, remedy: str = "") -> Any:
    """Returns the value of a JSON file that jaxgpt wrote, checked against `schema` (`parse_json`).

    `remedy` ends the error's message: what to do about it.

    Raises:
      Missing: if there is no such file.
      Damaged: if it cannot be read, is not UTF-8 JSON or does not fit `schema`. Both are
        `BadInput`, so that only a cache, which is rebuilt, has to catch them.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise Damaged(path, "it is not a file", remedy)
        return parse_json(read_bytes(path), schema)
    except FileNotFoundError as e:
        raise Missing(path, "is missing", remedy) from e
    except OSError as e:
        raise Damaged(path, f"it cannot be read ({e.strerror or e})", remedy) from e
    except ValueError as e:
        raise Damaged(path, str(e), remedy) from e


def parse_json(raw: bytes, schema: Any = object) -> Any:
    """Returns the value of the JSON text `raw`, checked against `schema`, which is one of

    - a type, or types joined by `|`; `float` allows integers, `int` does not allow bool, and both
      allow only finite numbers of 64 bits; `object` allows anything;
    - `{"name": schema, "name?": schema}`: an object with these fields, those with `?` optional;
    - `{str: schema}`: an object all of whose values fit;
    - `[schema]`: a list all of whose items fit;
    - `(schema, schema)`: a list of exactly these items.

    Raises:
      ValueError: saying what is wrong and where; also for lone surrogates, nesting deeper than
        `DEEPEST` and integers of thousands of digits.
    """
    try:
        value = json.loads(raw.decode())
        _check_text(value)
    except RecursionError as e:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"it is not UTF-8 (byte {e.start:,})") from e
    except UnicodeEncodeError as e:
        raise ValueError("it holds half of a surrogate pair") from e
    except ValueError as e:
        raise ValueError(f"it is not valid JSON ({e})") from e
    return check_json(value, schema)


def check_json(value: Any, schema: Any) -> Any:
    """Returns `value` unchanged if it fits `schema` (see `parse_json`). Raises `ValueError`, saying
    what does not fit."""
    if fault := _misfit(value, schema, ""):
        raise ValueError(fault)
    return value


def _check_text(value: Any) -> None:
    """Raises RecursionError or UnicodeEncodeError for a value too deep or with lone surrogates."""
    level = [value]
    for _ in range(DEEPEST):
        objects = [v for v in level if isinstance(v, dict)]
        keys = [key for v in objects for key in v]
        "".join(text for text in level + keys if isinstance(text, str)).encode()
        below = [v.values() for v in objects] + [v for v in level if isinstance(v, list)]
        level = [child for values in below for child in values]
        if not level:
            return
    raise RecursionError


def _misfit(value: Any, schema: Any, where: str) -> str:
    """Returns what in `value`, which is at `where`, does not fit `schema`, '' if nothing."""
    here = where.removeprefix(".") or "it"
    if isinstance(schema, dict) and isinstance(value, dict):
        if str in schema:
            pairs = [(name, schema[str]) for name in value]
        else:
            pairs = [(name.removesuffix("?"), inner) for name, inner in schema.items()]
        for name, inner in pairs:
            if name not in value:
                if f"{name}?" in schema:
                    continue
                return f"{here} has no {name}"
            if fault := _misfit(value[name], inner, f"{where}.{name[:80]}"):
                return fault
        return ""
    if isinstance(schema, list | tuple) and isinstance(value, list):
        if isinstance(schema, tuple) and len(schema) != len(value):
            return f"{here} has {len(value)} items, not {len(schema)}"
        inners = schema if isinstance(schema, tuple) else schema * len(value)
        faults = (_misfit(v, s, f"{where}[{i}]") for i, (v, s) in enumerate(zip(value, inners)))
        return next(filter(None, faults), "")
    wanted = dict if isinstance(schema, dict) else schema
    wanted = list if isinstance(schema, list | tuple) else wanted
    kinds = getattr(wanted, "__args__", (wanted,))
    if object in kinds or type(value) in kinds or (type(value) is int and float in kinds):
        if object in kinds or type(value) not in (int, float):
            return ""
        fits = abs(value) < NUMBERS if type(value) is int else math.isfinite(value)
        return "" if fits else f"{here} is no number of 64 bits"
    return f"{here} is {NAMES[type(value)]}, not {' or '.join(NAMES[kind] for kind in kinds)}"


def path_of(text: str, what: str) -> Path:
    """Returns the local path `text`, given in the flag or field `what`, with `~` expanded. Raises
    `BadInput` if it is the home of an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise BadInput(f"{what}={text} is not a path: {e}") from e


@contextmanager
def whole_folder(target: Path, flag: str, is_locked: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target` that is renamed to it if the body succeeds.

    What a killed process left of it is removed first (see `remove_leftovers`).

    Raises:
      BadInput: if `target` is not empty (`flag` chooses another), or cannot be written; nothing is
        left behind then.
    """
    try:
        if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
            raise BadInput(f"{target} exists already; choose another {flag}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _renamed(target, is_locked) as scratch:
            scratch.mkdir()
            yield scratch
    except OSError as e:
        raise BadInput(f"cannot write {target}: {e}") from e


@contextmanager
def locked(path: os.PathLike, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Holds the lock of a file, which is made if need be, or of a folder, until the body ends.

    Where another process holds it, calls `on_wait`, which may raise, and then waits. Yields False
    on file systems without locks.
    """
    # NFS gives an exclusive lock only on a file that is open for writing
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT)
    try:
        is_locked = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            is_locked = False
        yield is_locked
    finally:
        os.close(handle)


def remove_any(path: Path) -> None:
    """Removes a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: os.PathLike) -> None:
    """Removes a folder, if it is there, though a thread of a failed save may be writing into it."""
    folder = epath.Path(folder)
    for _ in range(100):
        with contextlib.suppress(OSError):
            folder.rmtree()
        if not folder.exists():
            return
        time.sleep(0.1)


def write_whole(path: os.PathLike, text: str) -> None:
    """Writes `text` atomically: a reader, also after a kill, finds the old file or the new one.

    Several processes and threads may write the same file: the last one wins. An object store's
    writes are atomic by themselves.

    Raises:
      BadInput: if it cannot be written; the old file is still there then.
    """
    path = epath.Path(path)
    try:
        if "://" in os.fspath(path):
            path.write_text(text)
            return
        with _renamed(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
    except OSError as e:
        raise BadInput(
            f"cannot write {path}: {e.strerror or e}; make room or choose another"
        ) from e


@contextmanager
def _renamed(target: os.PathLike, is_locked: bool = False) -> Iterator[Path]:
    """Yields a path to write to, which is renamed to `target` if the body succeeds, else removed.

    What a killed process left of the same target is removed first (see `remove_leftovers`).
    """
    remove_leftovers(target, is_locked)
    scratch = scratch_for(target)
    try:
        yield scratch
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True) if scratch.is_file() else remove_folder(scratch)


def scratch_for(target: os.PathLike) -> Path:
    """Returns the path beside `target` at which only this thread builds it."""
    own = f"{os.getpid()}.{threading.get_native_id()}.tmp"
    return Path(target).with_name(f"{_scratch_prefix(target)}{own}")


def remove_leftovers(target: os.PathLike, is_locked: bool = False) -> None:
    """Removes what ended processes of this machine left at their `scratch_for(target)`.

    If the caller holds a lock that all writers of `target` take (`is_locked`), it removes what
    any process of any machine left there.
    """
    prefix = _scratch_prefix(target)
    of_any_host = prefix.removesuffix(f"{_host()}.")
    with os.scandir(Path(target).parent) as entries:
        paths = [entry.path for entry in entries if entry.name.startswith(of_any_host)]
    for path in paths:
        process = path.rpartition(prefix)[2].partition(".")[0]
        own = path == str(scratch_for(target))  # of an ended process with the same number
        ended = own or (process.isdigit() and not _is_alive(int(process)))
        if ended or (is_locked and path.endswith(".tmp")):
            with contextlib.suppress(OSError):
                remove_any(Path(path))


def _scratch_prefix(target: os.PathLike) -> str:
    name = os.path.basename(os.fspath(target))
    if len(os.fsencode(name)) > 80:  # the whole name must have fewer than 255 bytes
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}.{_host()}."


def _host() -> str:
    return os.uname().nodename[:64]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as e:
        return not isinstance(e, ProcessLookupError)
    return True
