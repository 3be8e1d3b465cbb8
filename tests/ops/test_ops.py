"""Pure functions against float64 NumPy, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.ops.cross_entropy import IGNORE, chunked_cross_entropy, chunks_for, cross_entropy
from jaxgpt.ops.norm import layer_norm, rms_norm
from jaxgpt.ops.rope import rope_frequencies, rotate, sinusoids


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_cross_entropy_against_float64():
    logits, targets = 30 * normal(2, 3, 11), np.array([[0, 10, IGNORE], [5, IGNORE, 5]])
    logits[..., 9] = -np.inf  # a padded id
    shifted = logits - logits.max(-1, keepdims=True)
    lse = np.log(np.exp(shifted).sum(-1)) + logits.max(-1)
    counted = targets != IGNORE
    picked = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    want = np.where(counted, lse - picked, 0)
    args = jnp.asarray(logits, jnp.float32), jnp.asarray(targets)
    nats, ours_lse = cross_entropy(*args)
    np.testing.assert_allclose(nats, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours_lse, np.where(counted, lse, 0), rtol=1e-6)
    softmax = np.exp(logits - lse[..., None])
    gradient = np.where(counted[..., None], softmax - (np.arange(11) == targets[..., None]), 0)
    got = jax.grad(lambda x: jnp.sum(cross_entropy(x, args[1])[0]))(args[0])
    np.testing.assert_allclose(got, gradient, atol=1e-6)


@pytest.mark.parametrize("chunks", [2, 6])
def test_chunks_change_neither_loss_nor_gradient(chunks):
    x, table = (jnp.asarray(normal(*s), jnp.float32) for s in ((3, 12, 5), (7, 5)))
    targets = jnp.asarray(np.random.default_rng(1).integers(-1, 7, (3, 12)))

    def losses(x, table, n):
        return chunked_cross_entropy(lambda x: 3 * x @ table.T, x, targets, n)

    def total(x, table, n):
        nats, lse = losses(x, table, n)
        return jnp.sum(nats * jnp.arange(12)) + 0.1 * jnp.sum(lse**2)

    for got, want in zip(losses(x, table, chunks), losses(x, table, 1), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    gradients = [jax.grad(total, argnums=(0, 1))(x, table, n) for n in (chunks, 1)]
    for got, want in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_chunked_logits_are_never_whole():
    """The compiled gradient holds one slice of the logits, not all of them."""
    x, table = jnp.zeros((4, 64, 8)), jnp.zeros((1024, 8))
    targets = jnp.zeros((4, 64), jnp.int32)

    def temporaries(chunks):
        def total(x, table):
            return jnp.sum(chunked_cross_entropy(lambda x: x @ table.T, x, targets, chunks)[0])

        compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * 64 * 1024 * 4
    assert temporaries(1) >= whole > 2 * temporaries(8)


def test_number_of_chunks():
    assert chunks_for(8, 256, 4096, "cpu") == 4
    assert chunks_for(8, 256, 4096, "tpu") == 1
    assert chunks_for(8, 1024, 50304, "tpu") == 8
    assert chunks_for(1, 7, 10**9, "tpu") == 7, "at most a position each"
    assert chunks_for(8, 250, 4096, "cpu") == 5, "slices are equal"


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
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
        1j * positions[:, :, None, None] * frequencies
    )
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
