"""Rules that tell prose from the rest of the web.

The numbers are those of Gopher (arXiv:2112.11446, appendix A.1.1 and table A1) and, where marked,
of C4 (arXiv:1910.10683, section 2.2). They are for English prose; code fails them.
"""

import re
from collections import Counter
from collections.abc import Callable
from statistics import fmean

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("•", "-", "*", "‣", "●")
MARKS = ".,;:!?\"'()"
SYMBOL = re.compile(r"#|\.\.\.|…")
LETTER = re.compile(r"[^\W\d_]")
SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s|$)")
# (n, largest share of the characters in the most frequent n-gram), table A1
TOP_NGRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
# (n, largest share of the characters in n-grams that occur more than once), table A1
REPEATED_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


def quality_fault(text: str) -> str:
    """Returns the first rule that `text` breaks, '' if it breaks none."""
    words = text.split()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    rules: dict[str, Callable[[], bool]] = {  # in order: the first one guards the divisions
        "word_count": lambda: not 50 <= len(words) <= 100_000,
        "word_length": lambda: not 3 <= fmean(map(len, words)) <= 10,
        "symbols": lambda: len(SYMBOL.findall(text)) / len(words) > 0.1,
        "letters": lambda: fmean(bool(LETTER.search(word)) for word in words) < 0.8,
        "stop_words": lambda: len(STOP_WORDS & {w.lower().strip(MARKS) for w in words}) < 2,
        "bullets": lambda: fmean(line.startswith(BULLETS) for line in lines) > 0.9,
        "ellipses": lambda: fmean(line.endswith(("...", "…")) for line in lines) > 0.3,
        "lorem_ipsum": lambda: "lorem ipsum" in text.lower(),  # C4
        "sentences": lambda: len(SENTENCE_END.findall(text)) < 3,  # C4
    }
    fault = next((name for name, is_broken in rules.items() if is_broken()), "")
    return fault or _repetition(text, words, lines)


def _repetition(text: str, words: list[str], lines: list[str]) -> str:
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
    for parts, name in ((lines, "repeated_lines"), (paragraphs, "repeated_paragraphs")):
        repeats = [part for part, count in Counter(parts).items() for _ in range(count - 1)]
        if len(repeats) / len(parts) > 0.30 or sum(map(len, repeats)) / len(text) > 0.20:
            return name
    characters = sum(map(len, words))
    for n, limit in TOP_NGRAMS:
        gram, count = Counter(zip(*(words[i:] for i in range(n)), strict=False)).most_common(1)[0]
        if count > 1 and count * sum(map(len, gram)) / characters > limit:
            return f"top_{n}gram"
    for n, limit in REPEATED_NGRAMS:
        if _repeated_characters(words, n) / characters > limit:
            return f"repeated_{n}grams"
    return ""


def _repeated_characters(words: list[str], n: int) -> int:
    """Returns the characters of all words inside some n-gram seen before; each counts once."""
    seen, covered, until = set(), 0, 0
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered += sum(map(len, words[max(i, until) : i + n]))
            until = i + n
        seen.add(gram)
    return covered
