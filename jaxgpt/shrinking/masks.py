"""Which weights of a matrix [inputs, outputs] pruning keeps."""

import numpy as np
from jaxtyping import Bool, Float


def scores(
    matrix: Float[np.ndarray, "I O"], norms: Float[np.ndarray, "I"] | None = None
) -> Float[np.ndarray, "I O"]:
    """Returns each weight's importance: its magnitude, times the norm of its input over the
    calibration text where `norms` are given (Wanda, arXiv:2306.11695, eq. 1)."""
    size = np.abs(np.asarray(matrix, np.float32))
    return size if norms is None else size * np.asarray(norms, np.float32)[:, None]


def keep_largest(
    scores: Float[np.ndarray, "I O"], share: float, *, by_output: bool
) -> Bool[np.ndarray, "I O"]:
    """Returns False for the share of weights of the smallest scores, of the whole matrix or of each
    output's own weights. So many are removed exactly, rounded; of equal ones the first."""
    flat = scores.T if by_output else scores.reshape(1, -1)
    removed = round(share * flat.shape[1])
    keep = np.ones(flat.shape, bool)
    order = np.argsort(flat, axis=1, kind="stable")
    np.put_along_axis(keep, order[:, :removed], False, axis=1)
    return keep.T if by_output else keep.reshape(scores.shape)


def keep_two_of_four(scores: Float[np.ndarray, "I O"]) -> Bool[np.ndarray, "I O"]:
    """Returns True for the two largest scores of every four neighbours along the inputs, the form
    that sparse tensor cores multiply (arXiv:2104.08378, section 3); of a rest of fewer than four,
    at most two."""
    inputs, outputs = scores.shape
    padded = np.full((-(-inputs // 4) * 4, outputs), -np.inf, np.float32)
    padded[:inputs] = scores
    groups = padded.reshape(-1, 4, outputs)
    largest = np.argsort(-groups, axis=1, kind="stable")[:, :2]
    keep = np.zeros(groups.shape, bool)
    np.put_along_axis(keep, largest, True, axis=1)
    return keep.reshape(padded.shape)[:inputs]
