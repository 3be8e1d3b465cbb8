"""Which documents are held out for validation."""

import dataclasses
import hashlib
from collections.abc import Iterator

from jaxgpt.config import BadInput
from jaxgpt.data.sources import Documents


@dataclasses.dataclass(frozen=True)
class Scan:
    """A corpus's content hash and the UTF-8 bytes of each document."""

    digest: str
    sizes: tuple[int, ...]


def scan(documents: Documents, source: str) -> Scan:
    """Reads a corpus once.

    Raises:
      BadInput: if it holds no text.
    """
    digest, sizes = hashlib.blake2b(digest_size=16), []
    for text in documents():
        raw = text.encode("utf-8")
        sizes.append(len(raw))
        digest.update(len(raw).to_bytes(8, "little") + raw)
    if not sizes:
        raise BadInput(f"data source {source} is empty: it holds no text")
    return Scan(digest.hexdigest(), tuple(sizes))


def hold_out(documents: Documents, sizes: tuple[int, ...], fraction: float):
    """Returns the (train, validation) documents: the last `fraction` of the bytes is held out.

    Whole documents, cut at the boundary nearest to the fraction, at least one on each side. A
    single document is cut at the first line that starts in its last `fraction`, else (no such
    line) at its last line, else (one line only) at the character.
    """
    if len(sizes) == 1:
        return lambda: _one_part(documents, fraction, 0), lambda: _one_part(documents, fraction, 1)
    first_held_out = _boundary(sizes, fraction)

    def part(keep) -> Iterator[str]:
        return (text for i, text in enumerate(documents()) if keep(i))

    return (
        lambda: part(lambda i: i < first_held_out),
        lambda: part(lambda i: i >= first_held_out),
    )


def _boundary(sizes: tuple[int, ...], fraction: float) -> int:
    target, total, best = (1 - fraction) * sum(sizes), 0, (float("inf"), 1)
    for i, size in enumerate(sizes[:-1], start=1):
        total += size
        best = min(best, (abs(total - target), i))
    return best[1]


def _one_part(documents: Documents, fraction: float, part: int) -> Iterator[str]:
    (text,) = documents()
    cut = min(max(1, round(len(text) * (1 - fraction))), len(text) - 1)
    at_line = text.find("\n", cut - 1) + 1
    if not 0 < at_line < len(text):
        at_line = text.rfind("\n", 0, cut) + 1
    yield (text[: at_line or cut], text[at_line or cut :])[part]
