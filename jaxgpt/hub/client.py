"""What is asked of the hub, through `huggingface_hub`: its cache, `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE` are that library's."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from jaxgpt.hub.names import Name
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput, as_bad_input, described
from jaxgpt.system.extras import require

TIMEOUT = 10  # seconds until the hub counts as out of reach


class Answer(NamedTuple):
    """What the hub says of a repository: its commit and all its files; or why it says nothing."""

    commit: str = ""
    files: tuple[str, ...] = ()
    fault: str = ""


@cache
def repository(name: Name, kind: str) -> Answer:
    """Returns what the hub says of a `model` or `dataset` at its revision; asks once.

    Raises:
      BadInput: if it has no such repository or revision, or refuses it.
    """
    hub = _library(name, kind)
    ask = partial(hub.HfApi().repo_info, name.repo, revision=name.revision or None, repo_type=kind)
    with as_bad_input(lambda e: _why_refused(hub, name, kind, e)):
        try:
            info = ask(timeout=TIMEOUT)
            return Answer(info.sha, tuple(file.rfilename for file in info.siblings))
        except hub.errors.HfHubHTTPError as e:
            if e.response is None or e.response.status_code < 500:
                raise
            return Answer(fault=described(e))
        except ValueError:  # a name that none can have
            raise
        except Exception as e:  # the connection's errors are those of the library's HTTP client
            return Answer(fault=described(e))


def snapshot(name: Name, kind: str, patterns: Sequence[str]) -> Path:
    """Returns the folder, in the library's cache, with the files of a repository that match
    `patterns` (as in `fnmatch`); what it lacks is downloaded. Its name is the commit.

    Raises:
      BadInput: see `repository`; or if the cache lacks a file and the hub cannot be reached.
    """
    hub = _library(name, kind)
    get = partial(
        hub.snapshot_download,
        name.repo,
        repo_type=kind,
        revision=name.revision or "main",
        allow_patterns=list(patterns),
    )
    missing = hub.errors.LocalEntryNotFoundError
    with as_bad_input(lambda e: _why_refused(hub, name, kind, e)):
        if name.is_pinned:
            with suppress(missing):
                return Path(get(local_files_only=True))
        if not (fault := repository(name, kind).fault):  # with a timeout, which a download has not
            return Path(get())
        try:
            folder = Path(get(local_files_only=True))
        except missing as e:
            raise not_cached(name, kind, fault) from e
        say(f"hub       {kind} {name} is that of the cache, {folder.name}: {fault}")
        return folder


def not_cached(name: Name, kind: str, fault: str) -> BadInput:
    """Returns the error of a repository that is not in the cache and cannot be asked for."""
    constants = _library(name, kind).constants
    why = f"{constants.ENDPOINT} cannot be reached ({fault}): try again with a network"
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set: unset it to download"
    return BadInput(
        f"{kind} {name} is no folder here, and the cache {constants.HF_HUB_CACHE} does not hold all"
        f" of its files; {why}"
    )


def _library(name: Name, kind: str) -> ModuleType:
    for module in ("huggingface_hub.constants", "huggingface_hub.errors", "huggingface_hub"):
        hub = require(module, "hub", f"{kind} {name} of the Hugging Face hub")
    hub.logging.set_verbosity_error()  # it raises what it would warn of
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    return hub


def _why_refused(hub: ModuleType, name: Name, kind: str, e: BaseException) -> str:
    if isinstance(e, hub.errors.RevisionNotFoundError):
        return f"{kind} {name.at('')} has no revision {name.revision!r} on the hub"
    if isinstance(e, hub.errors.RepositoryNotFoundError):
        return (
            f"{name.at('')} is no folder here, and the hub has no {kind} of that name, or it is"
            " private or gated: then log in with hf auth login, or set HF_TOKEN"
        )
    return f"{kind} {name} cannot be had from the hub: {described(e)}"
