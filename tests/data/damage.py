"""Ways to damage a stored file."""

from pathlib import Path


def _flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "x").touch()


DAMAGE = {
    "flipped": _flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "empty": lambda file: file.write_bytes(b""),
    "ones": lambda file: file.write_bytes(b"\xff" * file.stat().st_size),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "null": lambda file: file.write_bytes(b"null"),
    "no object": lambda file: file.write_bytes(b"[]"),
    "empty object": lambda file: file.write_bytes(b"{}"),
    "other types": lambda file: file.write_bytes(
        b'{"format": 2, "kind": 3, "splits": [], "first": 1, "starts": null}'
    ),
    "deep": lambda file: file.write_bytes(b"[" * 9999),
    "gone": lambda file: file.unlink(),
    "a folder": _folder,
    "a loop": lambda file: (file.unlink(), file.symlink_to(file.name)),
}
