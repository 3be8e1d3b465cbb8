"""Rows for `objective=seq2seq` that a small model can learn in minutes, made from a seed:

    python tests/benchmarks/pairs.py strings|translation --out=DIR [--rows=20000] [--seed=0]

strings      "sort: cbda" -> "abcd", "reverse: cbda" -> "adbc", of 4 to 16 letters
translation  English -> German sentences from a grammar: gender, case, endings of adjectives, the
             verb second after an adverb and last after "weil"

Writes DIR/train.jsonl and DIR/validation.jsonl, which have no source in common.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

VALIDATION = 500  # rows

NOUNS = {  # English: German, its gender
    **{"man": ("Mann", "m"), "dog": ("Hund", "m"), "teacher": ("Lehrer", "m")},
    **{"table": ("Tisch", "m"), "tree": ("Baum", "m"), "bird": ("Vogel", "m")},
    **{"woman": ("Frau", "f"), "cat": ("Katze", "f"), "lamp": ("Lampe", "f")},
    **{"town": ("Stadt", "f"), "flower": ("Blume", "f"), "clock": ("Uhr", "f")},
    **{"child": ("Kind", "n"), "house": ("Haus", "n"), "book": ("Buch", "n")},
    **{"horse": ("Pferd", "n"), "picture": ("Bild", "n"), "window": ("Fenster", "n")},
}
ADJECTIVES = {
    **{"old": "alt", "small": "klein", "new": "neu", "young": "jung", "beautiful": "schön"},
    **{"red": "rot", "long": "lang", "good": "gut", "quiet": "ruhig", "strange": "seltsam"},
}
VERBS = {
    **{"sees": "sieht", "likes": "mag", "finds": "findet", "paints": "malt", "knows": "kennt"},
    **{"seeks": "sucht", "needs": "braucht", "shows": "zeigt", "buys": "kauft", "hears": "hört"},
}
ADVERBS = {"today": "heute", "often": "oft", "here": "hier", "never": "nie", "now": "jetzt"}
ARTICLES = {  # German, by (definite, case) and gender
    (True, "nominative"): {"m": "der", "f": "die", "n": "das"},
    (True, "accusative"): {"m": "den", "f": "die", "n": "das"},
    (False, "nominative"): {"m": "ein", "f": "eine", "n": "ein"},
    (False, "accusative"): {"m": "einen", "f": "eine", "n": "ein"},
}
ENDINGS = {  # of adjectives, likewise
    (True, "nominative"): {"m": "e", "f": "e", "n": "e"},
    (True, "accusative"): {"m": "en", "f": "e", "n": "e"},
    (False, "nominative"): {"m": "er", "f": "e", "n": "es"},
    (False, "accusative"): {"m": "en", "f": "e", "n": "es"},
}


def strings(rng: random.Random) -> tuple[str, str]:
    """Returns letters to sort or to reverse, and the result."""
    letters = [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(4, 16))]
    task = rng.choice(("sort", "reverse"))
    result = sorted(letters) if task == "sort" else letters[::-1]
    return f"{task}: {''.join(letters)}", "".join(result)


def translation(rng: random.Random) -> tuple[str, str]:
    """Returns an English sentence and its German translation."""
    english, german = _clause(rng, rng.choice([*ADVERBS, ""]))
    if rng.random() < 0.3:
        because, weil = _clause(rng, "", is_last=True)
        english, german = f"{english} because {because}", f"{german}, weil {weil}"
    return f"{english}.", f"{german[0].upper()}{german[1:]}."


def _clause(rng: random.Random, adverb: str, is_last: bool = False) -> tuple[str, str]:
    """Returns a clause, whose German verb is last, or second with the adverb first."""
    verb = rng.choice(list(VERBS))
    subject, subjekt = _noun_phrase(rng, "nominative")
    thing, objekt = _noun_phrase(rng, "accusative")
    words = [subjekt, objekt, VERBS[verb]] if is_last else [subjekt, VERBS[verb], objekt]
    if adverb:
        words = [ADVERBS[adverb], VERBS[verb], subjekt, objekt]
    return " ".join(filter(None, [adverb, subject, verb, thing])), " ".join(words)


def _noun_phrase(rng: random.Random, case: str) -> tuple[str, str]:
    noun, is_definite = rng.choice(list(NOUNS)), rng.random() < 0.5
    adjective = rng.choice([*ADJECTIVES, *[""] * 5])
    german, gender = NOUNS[noun]
    kind = is_definite, case
    ending = ADJECTIVES[adjective] + ENDINGS[kind][gender] if adjective else ""
    starts_with_vowel = (adjective or noun)[0] in "aeiou"
    article = "the" if is_definite else "an" if starts_with_vowel else "a"
    theirs = " ".join(filter(None, [ARTICLES[kind][gender], ending, german]))
    return " ".join(filter(None, [article, adjective, noun])), theirs


MAKERS: dict[str, Callable] = {"strings": strings, "translation": translation}


def write_pairs(kind: str, out: Path, rows: int, seed: int) -> None:
    """Writes `rows` training rows and `VALIDATION` others of a kind, all sources different."""
    rng, pairs = random.Random(seed), {}
    while len(pairs) < rows + VALIDATION:
        pairs.update([MAKERS[kind](rng)])
    lines = [json.dumps({"source": s, "target": t}, ensure_ascii=False) for s, t in pairs.items()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.jsonl").write_text("\n".join(lines[VALIDATION:]) + "\n")
    (out / "validation.jsonl").write_text("\n".join(lines[:VALIDATION]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(MAKERS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_pairs(args.kind, args.out, args.rows, args.seed)


if __name__ == "__main__":
    main()
