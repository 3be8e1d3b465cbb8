"""`manifest.json`: the size and CRC-32 of every file of a checkpoint, written after the others.

A checkpoint is whole if it has a manifest and its files match it.
"""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from jaxgpt.system.files import Damaged, Missing, read_json
from jaxgpt.system.stores import files_of

MANIFEST = "manifest.json"
REWRITTEN = "_CHECKPOINT_METADATA"  # Orbax adds the time of the commit to it later
BLOCK = 16 << 20
SCHEMA = {"files": {str: {"bytes": int, "crc32": int}}}


def write_manifest(folder: epath.Path) -> None:
    """Writes the manifest of everything in `folder`."""
    skipped = (MANIFEST, REWRITTEN)
    files = [name for name in files_of(folder) if name.rpartition("/")[2] not in skipped]
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
        return f"{MANIFEST} names {outside!a}, which is not a path inside a checkpoint"
    with ThreadPoolExecutor(4) as pool:
        faults = pool.map(lambda name: _compare(folder / name, wanted[name]), wanted)
        return next((f"{name} {fault}" for name, fault in zip(wanted, faults) if fault), "")


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def size_of(folder: epath.Path) -> int:
    """Returns the bytes of a checkpoint, according to its manifest."""
    files = read_json(folder / MANIFEST, SCHEMA)["files"]
    return sum(entry["bytes"] for entry in files.values())


def _compare(file: epath.Path, wanted: dict) -> str:
    try:
        entry = _entry(file)
    except FileNotFoundError:
        return "is missing"
    except OSError as e:
        return f"cannot be read: {e}"
    if entry["bytes"] != wanted["bytes"]:
        return f"has {entry['bytes']:,} bytes, not {wanted['bytes']:,}"
    return "" if entry == wanted else "has another checksum"


def _entry(file: epath.Path) -> dict:
    size = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"bytes": size, "crc32": crc}
