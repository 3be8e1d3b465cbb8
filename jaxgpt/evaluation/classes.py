"""How well predicted classes agree with the true ones."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Integer

Integers = Sequence[int] | Integer[np.ndarray, "N"]


def confusion_matrix(
    true: Integers, predicted: Integers, num_classes: int
) -> Int[np.ndarray, "C C"]:
    """Returns how many examples of each class (rows) were predicted as each class (columns)."""
    cells = np.asarray(true, np.int64) * num_classes + np.asarray(predicted, np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_scores(confusion: Int[np.ndarray, "C C"]) -> dict[str, float]:
    """Returns `accuracy`, `macro_f1` and `matthews`, all 0 where there is no example.

    `macro_f1` is the mean over the classes that occur, as truth or as prediction, of
    2 * right / (true + predicted). `matthews` is the correlation of truth and prediction for any
    number of classes (Gorodkin 2004, eq. 8): 1 is perfect, 0 is what one constant prediction gets.
    """
    counts = confusion.astype(np.float64)
    true, predicted, right = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    total, occurs = counts.sum(), true + predicted > 0
    f1 = 2 * right[occurs] / (true + predicted)[occurs]
    covariance = total * right.sum() - true @ predicted
    spread = np.sqrt(total**2 - predicted @ predicted) * np.sqrt(total**2 - true @ true)
    return {
        "accuracy": float(right.sum() / max(total, 1)),
        "macro_f1": float(f1.mean()) if occurs.any() else 0.0,
        "matthews": float(covariance / spread) if spread else 0.0,
    }
