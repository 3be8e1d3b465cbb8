"""Pure functions against float64 NumPy, value and gradient."""

import jax.numpy as jnp
import numpy as np

from jaxgpt.ops.norm import layer_norm, rms_norm
from jaxgpt.ops.rope import rope_frequencies, rotate, sinusoids


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_rms_norm_against_float64():
    x, scale = 3 + 5 * normal(4, 16), normal(16, seed=1)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    args = [jnp.asarray(a, jnp.float32) for a in (x, scale)]
    np.testing.assert_allclose(rms_norm(*args, 1e-6), want, atol=2e-6)


def test_rotation_against_complex_numbers():
    """Pair (x[i], x[i + H/2]) is a complex number, turned by exp(1j * position * frequency)."""
    x, positions = normal(2, 3, 1, 8), np.array([[0, 1, 5], [7, 8, 4000]])
    frequencies = rope_frequencies(8, 10_000.0, "none", 1.0, 8192)
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001])
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, :, None, None] * frequencies)
    want = np.concatenate([turned.real, turned.imag], -1)
    got = rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions), tuple(frequencies))
    np.testing.assert_allclose(got, want, atol=1e-3, err_msg="float32 angles up to 4000 radians")
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)


def test_rope_scaling():
    plain = rope_frequencies(8, 500_000.0, "none", 8.0, 8192)
    np.testing.assert_allclose(rope_frequencies(8, 500_000.0, "linear", 8.0, 8192), plain / 8)
    scaled = rope_frequencies(8, 500_000.0, "llama3", 8.0, 8192)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8)
    assert np.any(turns > 4) and np.any(turns < 1)
    # one radian a position makes 16 / (2 pi) = 2.546 turns in 16, 0.5155 of the way from 1 to 4
    (between,) = rope_frequencies(2, 10_000.0, "llama3", 8.0, 16)
    np.testing.assert_allclose(between, 0.5155 + 0.4845 / 8, rtol=1e-4)


def test_sinusoids_against_the_formula():
    positions = np.array([[0, 1, 9]])
    table = np.asarray(sinusoids(jnp.asarray(positions), 6))
    for t, i in np.ndindex(3, 3):
        angle = positions[0, t] / 10_000 ** (2 * i / 6)
        np.testing.assert_allclose(
            table[0, t, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-6
        )


def test_layer_norm_against_float64():
    x, scale, bias = 3 + 5 * normal(4, 16), normal(16, seed=1), normal(16, seed=2)
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    args = [jnp.asarray(a, jnp.float32) for a in (x, scale, bias)]
    np.testing.assert_allclose(layer_norm(*args, 1e-5), want, atol=2e-6)
    low = layer_norm(args[0].astype(jnp.bfloat16), *args[1:], 1e-5)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), want, atol=0.1)
