"""GPTQ against the method it is derived from, in float64."""

import numpy as np
import pytest

from jaxgpt.parameters.quantised import Format
from jaxgpt.shrinking.gptq import DAMP, best_scales, gptq
from tests.parameters.test_quantised import back


def problem(inputs=40, outputs=6, tokens=200):
    """A matrix and correlated inputs, one of which is never used."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((tokens, 12)) @ rng.standard_normal((12, inputs))
    x += 0.3 * rng.standard_normal(x.shape)
    x[:, 7] = 0
    return rng.standard_normal((inputs, outputs)), x


def brain_surgeon(fmt, w, moment, scales):
    """Optimal brain quantisation in a fixed order (arXiv:2208.11580, section 5): after each input,
    the others are changed by the inverse Hessian of those that are left, made anew."""
    w, inverse = w.copy(), np.linalg.inv(moment + DAMP * np.mean(np.diag(moment)) * np.eye(len(w)))
    for i in range(len(w)):
        _, rounded = fmt.rounded(w[i], scales[i])
        change = np.outer(inverse[:, i], (w[i] - rounded) / inverse[i, i])
        w[i] = rounded
        w[i + 1 :] -= change[i + 1 :]
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return w


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_it_rounds_as_optimal_brain_quantisation_does(kind, monkeypatch):
    """Over several blocks, the last of them short."""
    monkeypatch.setattr("jaxgpt.shrinking.gptq.BLOCK", 16)
    w, x = problem()
    moment, fmt = x.T @ x / len(x), Format(kind, 8)
    values, scales = gptq(fmt, w, moment)
    got = back(fmt, values, scales, -2, len(w))
    moment[7, 7], w[7] = 1, 0
    want = brain_surgeon(fmt, w, moment, np.repeat(scales, 8, axis=0))
    assert np.mean(np.isclose(got, want, atol=1e-6)) > 0.99  # but for ties, decided by rounding


def test_it_halves_the_error_of_rounding_to_the_nearest():
    w, x = problem(inputs=256, tokens=1000)
    fmt = Format("int4", 32)

    def error(parts):
        return np.square(x @ (w - back(fmt, *parts, -2, len(w)))).mean()

    assert error(gptq(fmt, w, x.T @ x / len(x))) < 0.5 * error(fmt.quantise(w, -2))


def test_scales_weigh_the_errors_by_input():
    """A large weight is clipped where its input hardly matters, and kept where it does."""
    w = np.array([[7.0], [0.5], [0.5], [0.5]], np.float32)
    fmt = Format("int4", 4)
    assert best_scales(fmt, w, np.array([1, 1, 1, 1], np.float32)) > 0.95
    assert best_scales(fmt, w, np.array([0, 1, 1, 1], np.float32)) < 0.65
