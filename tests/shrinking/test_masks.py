"""Which weights stay, against loops over every weight."""

import numpy as np
import pytest

from jaxgpt.shrinking.masks import keep_largest, keep_two_of_four, scores


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_the_smallest_share_goes(share, by_output):
    matrix = np.random.default_rng(0).normal(size=(13, 7))
    norms = np.random.default_rng(1).uniform(0.1, 9, 13)
    by_hand = np.array([[abs(matrix[i, o]) * norms[i] for o in range(7)] for i in range(13)])
    found = scores(matrix, norms)
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)
    keep = keep_largest(found, share, by_output=by_output)
    for kept, all_ in zip(
        *((keep.T, by_hand.T) if by_output else ([keep], [by_hand])), strict=True
    ):
        assert np.sum(~kept) == round(share * kept.size)
        assert max(all_[~kept], default=0) < min(all_[kept], default=np.inf)


def test_equal_weights_go_in_order():
    keep = keep_largest(np.ones((4, 2), np.float32), 0.5, by_output=True)
    np.testing.assert_array_equal(keep, [[False] * 2] * 2 + [[True] * 2] * 2)


@pytest.mark.parametrize("inputs", [4, 12, 13, 14, 15, 2])
def test_two_of_four(inputs):
    """Counted from the first input; a rest of three keeps two, of two or one all."""
    matrix = np.random.default_rng(inputs).normal(size=(inputs, 5))
    keep = keep_two_of_four(scores(matrix))
    for start in range(0, inputs, 4):
        for output in range(5):
            four = np.abs(matrix[start : start + 4, output])
            want = four >= sorted(four)[-2:][0]
            np.testing.assert_array_equal(keep[start : start + 4, output], want)
