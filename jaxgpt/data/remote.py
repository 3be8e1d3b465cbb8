"""Prepared corpora on object stores: written there whole, read through the local cache."""

import hashlib
import json
from functools import partial
from pathlib import Path

from etils import epath

from jaxgpt.config import BadInput
from jaxgpt.config.cli import say
from jaxgpt.config.stores import check_store, check_store_writable, copy_folder
from jaxgpt.data.shards import META, VERIFIED, read_meta, write_once


def publish(folder: Path, url: str) -> None:
    """Copies a prepared corpus to `url`; its meta.json comes last and declares the copy whole.

    Raises:
      BadInput: if `url` cannot be written, or holds another corpus.
    """
    check_store_writable(url)
    if (held := _read(url)) and json.loads(held)["key"] != read_meta(folder)["key"]:
        raise BadInput(f"{url} already holds another prepared corpus; choose another --out")
    if not held:
        say(f"data      copying to {url}")
        copy_folder(folder, url, last=META, without=(VERIFIED,))


def fetched(url: str, cache: Path) -> Path:
    """Returns the local copy of a prepared corpus, made now if `cache` has none.

    Raises:
      BadInput: if there is none at `url`, or it cannot be reached.
    """
    check_store(url)
    if not (held := _read(url)):
        raise BadInput(f"{url} holds no token shards; write some with jaxgpt.prepare --out={url}")
    folder = cache / f"shards-{hashlib.blake2b(held.encode(), digest_size=16).hexdigest()}"
    write_once(folder, cache / "locks", partial(_fetch, url))
    return folder


def _fetch(url: str, scratch: Path) -> None:
    say(f"data      fetching {url}")
    copy_folder(url, scratch)


def _read(url: str) -> str:
    try:
        return (epath.Path(url) / META).read_text()
    except FileNotFoundError:
        return ""
