"""Classes, answers and generated texts: each figure against its formula written out."""

import math
import re
from collections import Counter

import numpy as np
import pytest

from jaxgpt.evaluation.classes import class_scores, confusion_matrix
from jaxgpt.evaluation.spans import normalise, span_scores, word_f1
from jaxgpt.evaluation.text_overlap import overlap_scores
from jaxgpt.system.errors import BadInput


def test_class_scores_are_their_formulas():
    rng = np.random.default_rng(0)
    true = rng.choice(4, 300, p=[0.6, 0.3, 0.1, 0])  # class 3 occurs in neither
    predicted = np.where(rng.random(300) < 0.7, true, rng.integers(0, 3, 300))
    confusion = confusion_matrix(true, predicted, 4)
    pairs = list(zip(true.tolist(), predicted.tolist()))
    assert [[pairs.count((t, p)) for p in range(4)] for t in range(4)] == confusion.tolist()
    scores, f1 = class_scores(confusion), []
    for c in range(3):
        precision = np.mean(true[predicted == c] == c)
        recall = np.mean(predicted[true == c] == c)
        f1.append(2 * precision * recall / (precision + recall))
    indicator = np.eye(4)  # Matthews for many classes: correlation of the one-hot rows
    x, y = indicator[true], indicator[predicted]
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    matthews = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert scores["accuracy"] == pytest.approx(np.mean(true == predicted))
    assert scores["macro_f1"] == pytest.approx(np.mean(f1))
    assert scores["matthews"] == pytest.approx(matthews)


@pytest.mark.parametrize(
    ("true", "predicted", "expected"),
    [
        ([0, 1, 2], [0, 1, 2], (1.0, 1.0, 1.0)),
        ([0, 1, 1], [1, 1, 1], (2 / 3, 0.4, 0.0)),  # a constant predicts nothing
        ([0, 0, 1, 1], [1, 1, 0, 0], (0.0, 0.0, -1.0)),
        ([], [], (0.0, 0.0, 0.0)),
    ],
)
def test_class_scores_at_their_ends(true, predicted, expected):
    scores = class_scores(confusion_matrix(true, predicted, 3))
    assert tuple(scores.values()) == pytest.approx(expected)


def test_answers_are_normalised_as_squad_does():
    assert normalise("  The Cat's,\n an  A-1 the ") == "cats a1"
    assert normalise("Anthem of theatre") == "anthem of theatre", "articles are whole words"
    assert word_f1("a big big cat", "the big cat sat") == pytest.approx(2 * 2 / (3 + 3))
    assert word_f1("the", "a") == 1 and word_f1("the", "cat") == 0


def test_span_scores_take_the_best_reference():
    found = span_scores(["Paris", "in 1889"], [["paris!", "London"], ["the year 1889", "1889"]])
    assert found == {"examples": 2, "exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3) / 2)}


def test_questions_without_answer_count_by_themselves():
    found = span_scores(["", "x", "x y", ""], [[], ["", "the"], ["y"], ["z"]])
    assert found == {
        "examples": 4,
        "exact_match": 0.25,
        "f1": pytest.approx((1 + 0 + 2 / 3 + 0) / 4),
        "answer_exact_match": 0.0,
        "answer_f1": pytest.approx(1 / 3),
        "no_answer_accuracy": 0.5,
    }


PREDICTED = ["the cat sat on the mat today", "he reads two books", "no"]
WANTED = ["the cat sat on a mat today", "he reads the two old books", "yes"]


def ngrams(items, n: int) -> Counter:
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def overlap(n: int, split=str.split) -> tuple[int, int, int]:
    """n-grams that both have, that were predicted and that were wanted, over the whole set."""
    pairs = [(ngrams(split(p), n), ngrams(split(w), n)) for p, w in zip(PREDICTED, WANTED)]
    columns = zip(*(((p & w).total(), p.total(), w.total()) for p, w in pairs))
    return tuple(map(sum, columns))


def test_overlap_scores_are_their_formulas():
    found = overlap_scores(PREDICTED, WANTED)
    logs = [math.log(overlap(n)[0] / overlap(n)[1]) for n in (1, 2, 3, 4)]
    shortness = min(0.0, 1 - overlap(1)[2] / overlap(1)[1])
    assert found["bleu"] == pytest.approx(100 * math.exp(shortness + sum(logs) / 4))
    precision = recall = 0
    for n in range(1, 7):
        same, ours, theirs = overlap(n, lambda text: text.replace(" ", ""))
        precision, recall = precision + same / ours / 6, recall + same / theirs / 6
    assert found["chrf"] == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))
    # by hand: of 7 and 7 words 6 are shared and 3 of 6 pairs; of 4 and 6 all 4 and 1 of 3 and 5
    assert found["rouge1"] == pytest.approx((6 / 7 + 2 * 4 / 10 + 0) / 3)
    assert found["rouge2"] == pytest.approx((4 / 6 + 2 * 1 / 8 + 0) / 3)
    assert found["rougeL"] == pytest.approx((6 / 7 + 2 * 4 / 10 + 0) / 3)
    assert found["exact_match"] == 0 and overlap_scores(WANTED, WANTED)["exact_match"] == 1
    assert re.match(r"nrefs:1\|case:mixed", found["bleu_by"])


@pytest.mark.parametrize("lacking", ["sacrebleu", "rouge_score"])
def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, lacking):
    import importlib

    real = importlib.import_module

    def without(name, *args):
        if name.startswith(lacking):
            raise ImportError(f"No module named {lacking!r}")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(BadInput, match=rf"{lacking}.*pip install -e '.\[metrics\]'"):
        overlap_scores(PREDICTED, WANTED)
