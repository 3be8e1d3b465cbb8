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
    """A stored file that is not what was written: `path` and `why`."""

    def __init__(self, path: os.PathLike, why: str, remedy: str = ""):
        super().__init__(f"{path} is damaged: {why}" + (f"; {remedy}" if remedy else ""))
        self.path, self.why = path, why


class Missing(Damaged):
    """A stored file that is not there."""

    def __init__(self, path: os.PathLike, remedy: str = ""):
        BadInput.__init__(self, f"{path} is missing" + (f"; {remedy}" if remedy else ""))
        self.path, self.why = path, "is missing"


def read_json(path: os.PathLike, schema: Any = object, remedy: str = "") -> Any:
    """Returns the value of a JSON file that jaxgpt wrote, checked against `schema` (`parse_json`).

    `remedy` ends the error's message: what to do about it.

    Raises:
      Missing: if there is no such file.
      Damaged: if it cannot be read, is not UTF-8 JSON or does not fit `schema`. Both are
        `BadInput`, so a damaged workdir needs no `except`; a cache catches it and is rebuilt.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise Damaged(path, "it is not a file", remedy)
        return parse_json(read_bytes(path), schema)
    except FileNotFoundError as e:
        raise Missing(path, remedy) from e
    except OSError as e:
        raise Damaged(path, f"it cannot be read ({e.strerror or e})", remedy) from e
    except ValueError as e:
        raise Damaged(path, str(e), remedy) from e


def parse_json(raw: bytes, schema: Any = object) -> Any:
    """Returns the JSON value that `raw` spells, checked against `schema`, which is one of

    - a type, or types joined by `|`: the value is of it; `float` takes integers too, `int` no
      bool, and both only what is finite and fits 64 bits; `object` takes anything;
    - `{"name": schema, "name?": schema}`: an object with these fields, those with `?` optional;
    - `{str: schema}`: an object whose every value fits;
    - `[schema]`: a list whose every item fits;
    - `(schema, schema)`: a list of as many items, each of which fits its own.

    Raises:
      ValueError: saying what is wrong and where, for anything else, also for lone surrogates,
        nesting beyond `DEEPEST` and integers of thousands of digits.
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
    """Returns a JSON value unchanged that fits `schema` (see `parse_json`).

    Raises:
      ValueError: saying what of it does not fit.
    """
    if fault := _misfit(value, schema, ""):
        raise ValueError(fault)
    return value


def _check_text(value: Any) -> None:
    """Raises what `parse_json` names if `value` is too deep or holds a lone surrogate."""
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
    """Returns what of `value`, which stands at `where`, does not fit `schema`, '' if all does."""
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
        known = object in kinds or type(value) not in (int, float)
        if not (known or (abs(value) < NUMBERS if type(value) is int else math.isfinite(value))):
            return f"{here} is no number of 64 bits"
        return ""
    return f"{here} is {NAMES[type(value)]}, not {' or '.join(NAMES[kind] for kind in kinds)}"


def path_of(text: str, what: str) -> Path:
    """Returns the local path that `text` names, `~` resolved.

    Raises:
      BadInput: for the home of nobody; `what` names the flag or field.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise BadInput(f"{what}={text} names no path: {e}") from e


@contextmanager
def whole_folder(target: Path, flag: str, is_locked: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its name if the body succeeds.

    What a killed process left of the same folder is removed first (see `remove_leftovers`).

    Raises:
      BadInput: now, if `target` holds something (`flag` names another); at the end, if it cannot
        be written. Nothing is left behind then.
    """
    try:
        if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
            raise BadInput(f"{target} exists already; choose another {flag}")
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target, is_locked)
        scratch = scratch_for(target)
        try:
            scratch.mkdir()
            yield scratch
            if target.is_dir():
                target.rmdir()
            scratch.rename(target)
        finally:
            remove_folder(scratch)
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
    """Removes a folder, if it is there; a thread of a save that failed may be writing into it."""
    folder = epath.Path(folder)
    for _ in range(100):
        with contextlib.suppress(OSError):
            folder.rmtree()
        if not folder.exists():
            return
        time.sleep(0.1)


def write_whole(path: os.PathLike, text: str) -> None:
    """Writes `text` so that a reader, or a kill at any instant, finds the old file or the new.

    Any number of processes and threads may write the same file: the last one stays. What a killed
    one left is removed. An object store's writes are whole by themselves.

    Raises:
      BadInput: if it cannot be written; the old file is still there then.
    """
    path = epath.Path(path)
    try:
        if "://" in os.fspath(path):
            path.write_text(text)
            return
        remove_leftovers(path)
        scratch = scratch_for(path)
        try:
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as e:
        raise BadInput(
            f"cannot write {path}: {e.strerror or e}; make room or choose another"
        ) from e


def scratch_for(target: os.PathLike) -> Path:
    """Returns the path beside `target` at which this thread alone builds it."""
    own = f"{os.getpid()}.{threading.get_native_id()}.tmp"
    return Path(target).with_name(f"{_scratch_prefix(target)}{own}")


def remove_leftovers(target: os.PathLike, is_locked: bool = False) -> None:
    """Removes what processes of this machine that have ended left at `scratch_for(target)`.

    Of a caller that holds a lock that all writers of `target` take (`is_locked`), whatever any
    process of any machine left there.
    """
    prefix = _scratch_prefix(target)
    of_any_host = prefix.removesuffix(f"{_host()}.")
    with os.scandir(Path(target).parent) as entries:
        paths = [entry.path for entry in entries if entry.name.startswith(of_any_host)]
    for path in paths:
        process = path.rpartition(prefix)[2].partition(".")[0]
        own = path == str(scratch_for(target))  # of a process that had the same number before
        ended = own or (process.isdigit() and not _is_alive(int(process)))
        if ended or (is_locked and path.endswith(".tmp")):
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.unlink(path)


def _scratch_prefix(target: os.PathLike) -> str:
    name = os.path.basename(os.fspath(target))
    if len(os.fsencode(name)) > 80:  # with the rest it must stay below 255 bytes
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}.{_host()}."


def _host() -> str:
    return os.uname().nodename[:64]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
