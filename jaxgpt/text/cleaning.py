"""`data.clean`: a list of steps, each of which changes a document or drops it.

html         HTML to the text of its main content (resiliparse); other text stays as it is
unicode      NFC; no control characters, no byte-order marks; \\r\\n becomes \\n
quality      see `jaxgpt.text.quality`
exact_dedup  drops a document equal to an earlier one
near_dedup   drops one whose set of word 5-grams has a Jaccard similarity of 0.7 or more with an
             earlier one's, by MinHash LSH (arXiv:2107.06499 uses 0.8); near_dedup:0.8 sets it
pii          e-mail and public IP addresses become email@example.com, 192.0.2.1, 2001:db8::1;
             how many is counted by kind
"""

import dataclasses
import hashlib
import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version

from jaxgpt.system.errors import BadInput
from jaxgpt.system.extras import require
from jaxgpt.text.ngrams import ngram_hashes
from jaxgpt.text.pieces import Piece, join_pieces
from jaxgpt.text.quality import quality_fault

EXAMPLES = 3  # dropped documents that are kept of each rule
EXAMPLE_CHARS = 300
SHINGLE_WORDS = 5
PERMUTATIONS = 128

HTML_TAG = re.compile(r"<(!doctype html|html|head|body|div|p|br|table|span|article)\b", re.I)
EXAMPLE_EMAIL = "email@example.com"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}\b")
IP = re.compile(
    r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)"
)


class Dropped(str):
    """What a step returns instead of text: the name of the rule that drops the document."""


class Masked(str):
    """A text in which a step replaced something: `counts` says how often, by kind."""

    def __new__(cls, text: str, counts: dict[str, int]):
        """Returns `text` with its counts."""
        self = super().__new__(cls, text)
        self.counts = counts
        return self


Step = Callable[[str], str]


def html_to_text(text: str) -> str:
    """Returns the main content of a page as text, without tags; other text unchanged."""
    if not HTML_TAG.search(text[:10_000]):
        return text
    extract = require("resiliparse.extract.html2text", "data", "data.clean=html").extract_plain_text
    return extract(text, main_content=True, preserve_formatting=True)


def clean_unicode(text: str) -> str:
    """Returns `text` in NFC, line ends as \\n, without control characters but tab and newline."""
    return CONTROL.sub("", unicodedata.normalize("NFC", text.replace("\r\n", "\n")))


def drop_low_quality(text: str) -> str:
    """Returns `text`, or `quality.<rule>` if it breaks one."""
    fault = quality_fault(text)
    return Dropped(f"quality.{fault}") if fault else text


def mask_addresses(text: str) -> str:
    """Returns `text` with addresses replaced by ones that are reserved for documentation.

    The result is `Masked`, with counts of `email` and `ip`, if there were any.
    """
    counts: Counter[str] = Counter()

    def mask_email(match: re.Match) -> str:
        counts["email"] += match[0] != EXAMPLE_EMAIL
        return EXAMPLE_EMAIL

    def mask_ip(match: re.Match) -> str:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:  # 1.2.3.999, 12:30:45
            return match[0]
        if not address.is_global:  # 127.0.0.1, ::1, 192.168.0.1 identify nobody
            return match[0]
        counts["ip"] += 1
        return "192.0.2.1" if address.version == 4 else "2001:db8::1"

    masked = IP.sub(mask_ip, EMAIL.sub(mask_email, text))
    return Masked(masked, dict(+counts)) if +counts else text


class ExactDedup:
    """Drops a document that equals an earlier one. Takes 16 bytes of memory a document."""

    def __init__(self):
        self.seen: set[bytes] = set()

    def __call__(self, text: str) -> str:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in self.seen:
            return Dropped("exact_dedup")
        self.seen.add(digest)
        return text


class NearDedup:
    """Drops a document that MinHash with banding (datasketch) finds similar to an earlier one, and
    whose estimated Jaccard similarity with that is at least `threshold`.

    Documents of fewer than five words are kept. Takes about 2 KB of memory a document.
    """

    def __init__(self, threshold: float = 0.7):
        self.library = require("datasketch", "data", "data.clean=near_dedup")
        self.threshold, self.signatures = threshold, []
        # weights that prefer false positives: `__call__` compares the estimates as well
        self.index = self.library.MinHashLSH(threshold, PERMUTATIONS, weights=(0.1, 0.9))

    def __call__(self, text: str) -> str:
        shingles = ngram_hashes(text, SHINGLE_WORDS)
        if not len(shingles):
            return text
        signature = self.library.MinHash(PERMUTATIONS, seed=1, hashfunc=int, scheme="affine64")
        for start in range(0, len(shingles), 1 << 14):  # of 128 x 8 bytes each
            signature.update_batch(shingles[start : start + (1 << 14)].tolist())
        for key in self.index.query(signature):
            if self.signatures[key].jaccard(signature) >= self.threshold:
                return Dropped("near_dedup")
        self.index.insert(len(self.signatures), signature)
        self.signatures.append(signature)
        return text


STEPS: dict[str, Callable[..., Step]] = {
    "html": lambda: html_to_text,
    "unicode": lambda: clean_unicode,
    "quality": lambda: drop_low_quality,
    "exact_dedup": ExactDedup,
    "near_dedup": NearDedup,
    "pii": lambda: mask_addresses,
}
LIBRARIES = {"html": "resiliparse", "near_dedup": "datasketch"}


def make_steps(spec: str) -> list[tuple[str, Step]]:
    """Returns the named steps of `data.clean`, fresh ones. Raises `BadInput` for an unknown step or
    threshold, or a library that is not installed."""
    steps = []
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, _, argument = part.partition(":")
        if name not in STEPS or argument and name != "near_dedup":
            raise BadInput(f"data.clean step {part!r} is unknown; choose from {', '.join(STEPS)}")
        try:
            threshold = float(argument or 0.7)
        except ValueError:
            threshold = 0.0
        if not 0 < threshold <= 1:
            raise BadInput(f"data.clean={part}: the similarity must lie above 0 and up to 1")
        if name in LIBRARIES:
            require(LIBRARIES[name], "data", f"data.clean={name}")
        steps.append((name, STEPS[name](threshold) if argument else STEPS[name]()))
    return steps


def cleaning_identity(spec: str) -> str:
    """Returns all that the result of cleaning depends on besides the text: steps and libraries."""
    names = [part.strip().partition(":")[0] for part in spec.split(",")]
    used = [f"{LIBRARIES[n]} {version(LIBRARIES[n])}" for n in names if n in LIBRARIES]
    counted = " counted" if "pii" in names else ""  # older caches did not count masks
    return f"{spec} {unicodedata.unidata_version if 'unicode' in names else ''} {used}{counted}"


@dataclasses.dataclass
class Report:
    """What cleaning did.

    `dropped`: `{rule: {"documents": 3, "examples": [{"where", "text"}, ...]}}`.
    `masked`, of the documents that were kept: `{kind: {"masks": 5, "documents": 2, "examples"}}`,
    the examples as they read afterwards.
    """

    dropped: dict[str, dict] = dataclasses.field(default_factory=dict)
    masked: dict[str, dict] = dataclasses.field(default_factory=dict)


def _count(table: dict[str, dict], name: str, piece: Piece) -> dict:
    """Counts a document in the table's entry `name`, keeps the first few, returns the entry."""
    entry = table.setdefault(name, {"documents": 0, "examples": []})
    entry["documents"] += 1
    if len(entry["examples"]) < EXAMPLES:
        entry["examples"].append({"where": piece.where, "text": piece.text[:EXAMPLE_CHARS]})
    return entry


def clean_documents(
    pieces: Iterable[Piece], steps: list[tuple[str, Step]], report: Report
) -> Iterator[Piece]:
    """Yields what the steps leave of the documents; a document that ends up empty is dropped."""
    for piece in join_pieces(pieces):
        text, masks = piece.text, Counter()
        for name, step in steps:
            before, text = text, step(text)
            if isinstance(text, Masked) and text is not before:
                masks.update(text.counts)
            if isinstance(text, Dropped) or not text.strip():
                _count(report.dropped, text if isinstance(text, Dropped) else name, piece)
                break
        else:
            kept = piece._replace(text=str(text))
            for kind, count in masks.items():
                entry = _count(report.masked, kind, kept)
                entry["masks"] = entry.get("masks", 0) + count
            yield kept
