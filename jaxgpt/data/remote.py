"""Prepared corpora on object stores: copied there whole, read through the local cache."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from etils import epath

from jaxgpt.data.cache import T, load_or_write
from jaxgpt.data.shards import META, VERIFIED, read_meta
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged, Missing, read_json
from jaxgpt.system.stores import check_store, check_store_writable, copy_folder, read_bytes


def publish(folder: Path, url: str) -> None:
    """Copies a prepared corpus to `url`; its meta.json is copied last and completes it. Raises
    `BadInput` if `url` cannot be written, or holds another corpus."""
    check_store_writable(url)
    try:
        key = read_json(epath.Path(url) / META, {"key": str})["key"]
    except Missing:
        say(f"data      copying to {url}")
        copy_folder(folder, url, last=META, without=(VERIFIED,))
        return
    except Damaged:
        key = "unknown"
    if key != read_meta(folder)["key"]:
        raise BadInput(f"{url} already holds another prepared corpus; choose another --out")


def fetch(url: str, cache: Path, read: Callable[[Path], T]) -> T:
    """Returns `read` of the local copy of a prepared corpus, made now if `cache` has none or it is
    damaged. Raises `BadInput` if there is none at `url`, or it cannot be reached."""
    check_store(url)
    try:
        meta = read_bytes(epath.Path(url) / META)
    except FileNotFoundError as e:
        what_to_do = f"write some with jaxgpt.prepare --out={url}"
        raise BadInput(f"{url} holds no token shards; {what_to_do}") from e

    def write(scratch: Path) -> None:
        say(f"data      fetching {url}")
        copy_folder(url, scratch)

    folder = cache / f"shards-{hashlib.blake2b(meta, digest_size=16).hexdigest()}"
    return load_or_write(folder, cache / "locks", write, read)
