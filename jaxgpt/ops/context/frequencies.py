"""How fast rotary positions turn, also in contexts longer than those of pretraining."""

import math

import numpy as np

LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0  # Llama 3.1's low_freq_factor and high_freq_factor


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: str,
    factor: float,
    original_len: int,
    betas: tuple[float, float] = (32.0, 1.0),
) -> np.ndarray:
    """Returns the rotation of each of head_dim/2 pairs in radians per position, float64.

    theta**(-2i/head_dim) (arXiv:2104.09864, eq. 15); `linear` divides all by `factor` (position
    interpolation, arXiv:2306.15595); `llama3` divides those whose wavelength exceeds
    `original_len`, keeps those that turn at least four times within it, and blends between
    (Llama 3.1's release); `yarn` does so by `betas`, see `yarn_frequencies`.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling == "linear":
        return frequencies / factor
    if scaling == "llama3":
        turns = original_len * frequencies / (2 * math.pi)
        kept = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / factor
    if scaling == "yarn":
        return yarn_frequencies(frequencies, theta, factor, original_len, betas)
    return frequencies


def yarn_frequencies(
    frequencies: np.ndarray,
    theta: float,
    factor: float,
    original_len: int,
    betas: tuple[float, float],
) -> np.ndarray:
    """Returns the rotations of head_dim/2 pairs in radians per position: those that turn more than
    betas[0] times within `original_len` as they are, those that turn less than betas[1] times
    divided by `factor`, and a blend between them, linear in the number of the pair (YaRN,
    arXiv:2309.00071, section 3.2; its ends are rounded outwards to whole pairs, as in the authors'
    code)."""
    pairs = len(frequencies)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(original_len / (times * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(pair_that_turns(betas[0])), 0)
    high = min(math.ceil(pair_that_turns(betas[1])), 2 * pairs - 1)
    high = high if high != low else high + 0.001  # as the authors do
    divided = np.clip((np.arange(pairs) - low) / (high - low), 0, 1)
    return frequencies * (1 - divided) + frequencies / factor * divided


def attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Returns by what queries and keys are multiplied for a context `factor` times as long: the
    root of section 3.3's 1/t (equation 22), `mscale` being DeepSeek's weight of the logarithm."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
