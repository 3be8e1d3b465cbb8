"""Pure functions against float64 NumPy, value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import BadInput
from jaxgpt.ops.attention import Places, choose_kernel, xla_attention
from jaxgpt.ops.cross_entropy import IGNORE, chunked_cross_entropy, chunks_for, cross_entropy
from jaxgpt.ops.norm import layer_norm, rms_norm
from jaxgpt.ops.rope import rope_frequencies, rotate, sinusoids


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def numeric_gradient(f, x, along):
    """df/dx . along by central differences, in float64."""
    h = 1e-6
    return (f(x + h * along) - f(x - h * along)) / (2 * h)


def attention64(q, k, v, places, scale, window):
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        here, keys = places.q[b, t], places.kv[b]
        seen = keys <= here
        if window:
            seen &= keys > here - window
        if places.q_segments is not None:
            seen &= places.kv_segments[b] == places.q_segments[b, t]
        scores = scale * k[b, seen, n // group] @ q[b, t, n]
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


PLAIN = Places(np.tile(np.arange(7), (2, 1)), np.tile(np.arange(7), (2, 1)))
PACKED = np.array([[0, 0, 0, 1, 1, 1, 1], [5, 6, 6, 6, 6, 6, 0]])
RESTART = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 0]])
CASES = {
    "causal": (PLAIN, 3, 0),
    "grouped-query": (PLAIN, 1, 0),
    "window": (PLAIN, 3, 2),
    "packed": (Places(RESTART, RESTART, PACKED, PACKED), 3, 0),
    "packed window": (Places(RESTART, RESTART, PACKED, PACKED), 1, 3),
    "cached": (Places(np.array([[0, 1, 2], [4, 5, 6]]), PLAIN.kv), 3, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_against_float64(name):
    places, kv_heads, window = CASES[name]
    q = normal(2, places.q.shape[1], 3, 5)
    k, v = (normal(2, 7, kv_heads, 5, seed=s) for s in (1, 2))
    target = normal(*q.shape, seed=9)
    ours = functools.partial(
        xla_attention, places=jax.tree.map(jnp.asarray, places), scale=0.3, window=window
    )
    args = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    np.testing.assert_allclose(ours(*args), attention64(q, k, v, places, 0.3, window), atol=1e-6)
    grads = jax.grad(lambda *a: jnp.sum(ours(*a) * target), argnums=(0, 1, 2))(*args)
    for i, grad in enumerate(grads):
        along = normal(*args[i].shape, seed=20 + i)

        def value(x, i=i):
            moved = [x if j == i else a for j, a in enumerate((q, k, v))]
            return np.sum(attention64(*moved, places, 0.3, window) * target)

        want = numeric_gradient(value, (q, k, v)[i], along)
        np.testing.assert_allclose(np.sum(np.asarray(grad) * along), want, rtol=1e-5, atol=1e-5)


def test_attention_dropout_keeps_what_it_is_told():
    q, k, v = (jnp.asarray(normal(1, 4, 2, 8, seed=s), jnp.float32) for s in range(3))
    places = Places(jnp.arange(4)[None], jnp.arange(4)[None])
    kept = jnp.ones((1, 2, 4, 4), bool).at[:, 1].set(False)
    whole = xla_attention(q, k, v, places, scale=1.0)
    half = xla_attention(q, k, v, places, kept, scale=1.0, dropout=0.5)
    np.testing.assert_allclose(half[:, :, 0], 2 * whole[:, :, 0], 1e-6)
    assert np.all(np.asarray(half[:, :, 1]) == 0), "head 1 keeps nothing"


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
    assert chunks_for(8, 1024, 50304, "tpu") == 4
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


def test_kernel_choice():
    assert choose_kernel("auto", "cpu", "bfloat16", 64, 0.0) == "xla"
    assert choose_kernel("auto", "gpu", "bfloat16", 64, 0.0) == "cudnn"
    assert choose_kernel("auto", "gpu", "float32", 64, 0.0) == "xla"
    assert choose_kernel("auto", "gpu", "bfloat16", 64, 0.1) == "xla"
    assert choose_kernel("xla", "gpu", "bfloat16", 64, 0.0) == "xla"
    for args, message in (
        (("cpu", "bfloat16", 64, 0.0), "devices are cpu"),
        (("gpu", "float32", 64, 0.0), "float32 is not a 16-bit float"),
        (("gpu", "bfloat16", 12, 0.0), "width 12"),
        (("gpu", "bfloat16", 64, 0.1), "dropout"),
    ):
        with pytest.raises(BadInput, match=message):
            choose_kernel("cudnn", *args)
