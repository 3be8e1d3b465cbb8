"""Prepared corpora on object stores: written there whole, read through the local cache."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from etils import epath

from jaxgpt.data.shards import META, VERIFIED, T, cached, read_meta
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import parse_json
from jaxgpt.system.stores import check_store, check_store_writable, copy_folder


def publish(folder: Path, url: str) -> None:
    """Copies a prepared corpus to `url`; its meta.json comes last and declares the copy whole.

    Raises:
      BadInput: if `url` cannot be written, or holds another corpus.
    """
    check_store_writable(url)
    if (held := _read(url)) and _key_of(held) != read_meta(folder)["key"]:
        raise BadInput(f"{url} already holds another prepared corpus; choose another --out")
    if not held:
        say(f"data      copying to {url}")
        copy_folder(folder, url, last=META, without=(VERIFIED,))


def fetched(url: str, cache: Path, read: Callable[[Path], T]) -> T:
    """Returns `read` of the local copy of a prepared corpus, made now if `cache` has none or it is
    damaged.

    Raises:
      BadInput: if there is none at `url`, or it cannot be reached.
    """
    check_store(url)
    if not (held := _read(url)):
        raise BadInput(f"{url} holds no token shards; write some with jaxgpt.prepare --out={url}")
    folder = cache / f"shards-{hashlib.blake2b(held.encode(), digest_size=16).hexdigest()}"
    return cached(folder, cache / "locks", partial(_fetch, url), read)


def _key_of(meta: str) -> str:
    try:
        return parse_json(meta.encode(), {"key": str})["key"]
    except ValueError:  # damaged, so it is not ours
        return ""


def _fetch(url: str, scratch: Path) -> None:
    say(f"data      fetching {url}")
    copy_folder(url, scratch)


def _read(url: str) -> str:
    try:
        return (epath.Path(url) / META).read_text()
    except FileNotFoundError:
        return ""
