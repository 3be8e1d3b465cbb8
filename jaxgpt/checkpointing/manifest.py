"""`manifest.json`: the size and CRC-32 of every file of a checkpoint, written before it counts.

A checkpoint whose files differ from it, or that lacks it, is not whole.
"""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from jaxgpt.system.files import Damaged, Missing, read_json

MANIFEST = "manifest.json"
REWRITTEN = "_CHECKPOINT_METADATA"  # by Orbax, with the time of the commit
BLOCK = 16 << 20
SCHEMA = {"files": {str: {"bytes": int, "crc32": int}}}


def write_manifest(folder: epath.Path) -> None:
    """Writes the manifest of everything in `folder`."""
    files = list(_files(folder, folder))
    with ThreadPoolExecutor(4) as pool:
        entries = dict(zip(files, pool.map(lambda n: _entry(folder / n), files), strict=True))
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": entries}))


def damage(folder: epath.Path) -> str:
    """Returns what is wrong with a checkpoint, '' if nothing is."""
    try:
        wanted = read_json(folder / MANIFEST, SCHEMA)["files"]
    except Missing:
        return f"{MANIFEST} is missing"
    except Damaged as e:
        return f"{MANIFEST}: {e.why}"
    if outside := next((name for name in wanted if not _is_inside(name)), None):
        return f"{MANIFEST} names {outside!a}, which is no file of a checkpoint"
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda name: _compare(folder / name, wanted[name]), wanted)
        return next((f"{name} {fault}" for name, fault in zip(wanted, found) if fault), "")


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def size_of(folder: epath.Path) -> int:
    """Returns the bytes of a checkpoint, as its manifest has them."""
    files = read_json(folder / MANIFEST, SCHEMA)["files"]
    return sum(entry["bytes"] for entry in files.values())


def _compare(file: epath.Path, wanted: dict) -> str:
    try:
        found = _entry(file)
    except FileNotFoundError:
        return "is missing"
    except OSError as e:
        return f"cannot be read: {e}"
    if found["bytes"] != wanted["bytes"]:
        return f"has {found['bytes']:,} bytes, not {wanted['bytes']:,}"
    return "" if found == wanted else "has another checksum"


def _entry(file: epath.Path) -> dict:
    size = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"bytes": size, "crc32": crc}


def _files(folder: epath.Path, root: epath.Path):
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path, root)
        elif path.name not in (MANIFEST, REWRITTEN):
            yield str(path.relative_to(root))
