"""Rules that tell prose from the rest of the web.

The numbers are those of Gopher (arXiv:2112.11446, appendix A.1.1 and table A1) and, where marked,
of C4 (arXiv:1910.10683, section 2.2). They are for English prose; code fails them.
"""

import re
from collections import Counter

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("•", "-", "*", "‣", "●")
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
    return _fault_in_words(words) or _fault_in_lines(text, lines) or _repetition(text, words, lines)


def _fault_in_words(words: list[str]) -> str:
    count = len(words)
    if not 50 <= count <= 100_000:
        return "word_count"  # Gopher
    if not 3 <= sum(map(len, words)) / count <= 10:
        return "word_length"  # Gopher: mean length
    symbols = sum(word.count("#") + word.count("...") + word.count("…") for word in words)
    if symbols / count > 0.1:
        return "symbols"  # Gopher
    if sum(bool(LETTER.search(word)) for word in words) / count < 0.8:
        return "letters"  # Gopher: words with an alphabetic character
    if len(STOP_WORDS & {word.lower().strip(".,;:!?\"'()") for word in words}) < 2:
        return "stop_words"  # Gopher
    return ""


def _fault_in_lines(text: str, lines: list[str]) -> str:
    if sum(line.startswith(BULLETS) for line in lines) / len(lines) > 0.9:
        return "bullets"  # Gopher
    if sum(line.endswith(("...", "…")) for line in lines) / len(lines) > 0.3:
        return "ellipses"  # Gopher
    if "lorem ipsum" in text.lower():
        return "lorem_ipsum"  # C4
    if len(SENTENCE_END.findall(text)) < 3:
        return "sentences"  # C4: fewer than three
    return ""


def _repetition(text: str, words: list[str], lines: list[str]) -> str:
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
    for parts, name in ((lines, "repeated_lines"), (paragraphs, "repeated_paragraphs")):
        repeats = [part for part, count in Counter(parts).items() for _ in range(count - 1)]
        if len(repeats) / len(parts) > 0.30 or sum(map(len, repeats)) / len(text) > 0.20:
            return name  # Gopher
    characters = sum(map(len, words))
    for n, limit in TOP_NGRAMS:
        gram, count = Counter(zip(*(words[i:] for i in range(n)), strict=False)).most_common(1)[0]
        if count > 1 and count * sum(map(len, gram)) / characters > limit:
            return f"top_{n}gram"  # Gopher
    for n, limit in REPEATED_NGRAMS:
        if _covered(words, n) / characters > limit:
            return f"repeated_{n}grams"  # Gopher
    return ""


def _covered(words: list[str], n: int) -> int:
    """Returns the characters of all words inside some n-gram seen before; each counts once."""
    seen, covered, until = set(), 0, 0
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered += sum(map(len, words[max(i, until) : i + n]))
            until = i + n
        seen.add(gram)
    return covered
