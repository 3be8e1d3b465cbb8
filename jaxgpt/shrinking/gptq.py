"""GPTQ (arXiv:2210.17323): rounding that later weights make up for.

Of y = x W with x's second moments H = E[x x^T], the error that rounding one input's weights causes
is best undone by changing the weights of the inputs that come after it (equation 2), for all
outputs alike; the changes follow from the Cholesky factor of H^-1 (section 3.3, step 3).
"""

import dataclasses

import numpy as np

from jaxgpt.parameters.quantised import Format

BLOCK = 128  # inputs whose changes are applied to the rest at once
DAMP = 0.01  # of H's mean diagonal, added to it: the paper's
FACTORS = np.linspace(1.0, 0.6, 17, dtype=np.float32)  # of a group's widest scale: what is tried


def gptq(fmt: Format, w: np.ndarray, moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (values, scales) of a matrix [I, O] (axis -2) that multiplies inputs of second
    moments [I, I]. Groups must divide `BLOCK`, or be whole."""
    w, moment = np.array(w, np.float32), np.array(moment, np.float64)
    unused = np.diag(moment) == 0  # H would have no inverse, and their weights no effect
    moment[unused, unused], w[unused] = 1, 0
    upper, importance = _inverse_factor(moment), np.diag(moment).astype(np.float32)
    inputs, group = len(w), fmt.group or len(w)
    codes = np.empty(w.shape, fmt.dtype)
    scales = np.empty((-(-inputs // group), w.shape[1]), fmt.scale_dtype)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = np.empty((end - start, w.shape[1]), np.float32)
        for i in range(start, end):
            if i % group == 0:  # of the weights as the earlier ones have left them
                members = slice(i, min(i + group, inputs))
                scales[i // group] = best_scales(fmt, w[members], importance[members])
            codes[i], rounded = fmt.rounded(w[i], scales[i // group])
            errors[i - start] = (w[i] - rounded) / upper[i, i]
            w[i + 1 : end] -= np.outer(upper[i, i + 1 : end], errors[i - start])
        w[end:] -= upper[start:end, end:].T @ errors
    return fmt.pack(codes, -2), scales


def _inverse_factor(moment: np.ndarray) -> np.ndarray:
    """Returns the upper triangular U of H^-1 = U^T U, H being damped."""
    damped = moment + DAMP * np.mean(np.diag(moment)) * np.eye(len(moment))
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def best_scales(fmt: Format, w: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Returns the scale of each output of a group [I, O], as it is stored, whose rounding errors
    have the least sum of squares, weighted by input: clipping a group's largest weight can serve
    all others."""
    widest = dataclasses.replace(fmt, group=fmt.group and len(w)).scales_of(w, -2)[0]
    best, least = widest, np.full(w.shape[1], np.inf, np.float32)
    for factor in FACTORS:
        scales = (widest.astype(np.float32) * factor).astype(fmt.scale_dtype)
        _, rounded = fmt.rounded(w, scales)
        error = importance @ np.square(w - rounded)
        best = np.where(error < least, scales, best)
        least = np.minimum(error, least)
    return best
