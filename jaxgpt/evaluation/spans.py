"""Answers against reference answers, by SQuAD's rules (arXiv:1606.05250, section 6.1).

Case, punctuation, the words a, an and the, and extra white space do not count:
"The cat's, hat" equals "cats hat". Of several references, the one that fits best counts.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """Returns the part of an answer that counts."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(DROP_PUNCTUATION)).split())


def exact_match(predicted: str, reference: str) -> float:
    """Returns 1.0 if both are the same once normalised, else 0.0."""
    return float(normalise(predicted) == normalise(reference))


def word_f1(predicted: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall over the words that both have, each as
    often as both have it. Where one has no words, it is 1.0 if neither has (SQuAD 2.0)."""
    words, wanted = normalise(predicted).split(), normalise(reference).split()
    if not words or not wanted:
        return float(words == wanted)
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted))


def span_scores(
    predicted: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float | int]:
    """Returns `examples`, `exact_match` and `f1` (means, 0 to 1); where some questions have no
    answer (no reference, or only empty ones: SQuAD 2.0, arXiv:1806.03822), also the share of them
    whose prediction is empty, `no_answer_accuracy`, and the others' `answer_exact_match` and
    `answer_f1`. A prediction of "" says that there is no answer.
    """
    rows = []
    for text, given in zip(predicted, references, strict=True):
        wanted = [reference for reference in given if normalise(reference)] or [""]
        scores = (max(score(text, w) for w in wanted) for score in (exact_match, word_f1))
        rows.append((*scores, wanted != [""]))
    scores = {"examples": len(rows)} | _means(rows, "")
    if with_answer := [row for row in rows if row[2]]:
        scores |= _means(with_answer, "answer_") if len(with_answer) < len(rows) else {}
    if without := [row for row in rows if not row[2]]:
        scores["no_answer_accuracy"] = _means(without, "")["exact_match"]
    return scores


def _means(rows: list[tuple[float, float, bool]], prefix: str) -> dict[str, float]:
    count = max(len(rows), 1)
    return {
        f"{prefix}exact_match": sum(row[0] for row in rows) / count,
        f"{prefix}f1": sum(row[1] for row in rows) / count,
    }
