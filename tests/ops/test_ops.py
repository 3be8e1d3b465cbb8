"""Pure functions against float64 NumPy, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import BadInput
from jaxgpt.ops.attention import choose_kernel, xla_attention
from jaxgpt.ops.cross_entropy import IGNORE, cross_entropy
from jaxgpt.ops.norm import layer_norm


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def numeric_gradient(f, x, along):
    """df/dx . along by central differences, in float64."""
    h = 1e-6
    return (f(x + h * along) - f(x - h * along)) / (2 * h)


def attention64(q, k, v, positions):
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = positions[b, t] + 1
        scores = k[b, :seen, n] @ q[b, t, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, :seen, n]
    return out


@pytest.mark.parametrize("length", [7, 3])
def test_attention_against_float64(length):
    """Also with fewer queries than keys, as a cache has it, at other positions in each row."""
    q, k, v = (normal(2, n, 3, 5, seed=s) for s, n in enumerate((length, 7, 7)))
    positions = np.array([[0], [7 - length]]) + np.arange(length)
    target = normal(*q.shape, seed=9)

    def value(q, k, v):
        return np.sum(attention64(q, k, v, positions) * target)

    def ours(q, k, v):
        return jnp.sum(xla_attention(q, k, v, jnp.asarray(positions)) * target)

    args = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    got = xla_attention(*args, jnp.asarray(positions))
    np.testing.assert_allclose(got, attention64(q, k, v, positions), atol=1e-6)
    for i, grad in enumerate(jax.grad(ours, argnums=(0, 1, 2))(*args)):
        along = normal(*args[i].shape, seed=20 + i)

        def moved(x, i=i):
            return value(*[x if j == i else a for j, a in enumerate((q, k, v))])

        want = numeric_gradient(moved, (q, k, v)[i], along)
        np.testing.assert_allclose(np.sum(np.asarray(grad) * along), want, rtol=1e-5, atol=1e-5)


def test_attention_dropout_keeps_what_it_is_told():
    q, k, v = (jnp.asarray(normal(1, 4, 1, 8, seed=s), jnp.float32) for s in range(3))
    positions = jnp.arange(4)[None]
    everything = jnp.ones((1, 1, 4, 4), bool)
    whole = xla_attention(q, k, v, positions)
    np.testing.assert_allclose(xla_attention(q, k, v, positions, everything, 0.5), 2 * whole, 1e-6)
    nothing = xla_attention(q, k, v, positions, ~everything, 0.5)
    assert np.all(np.asarray(nothing) == 0)


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
        (("gpu", "float32", 64, 0.0), "float32 is not bfloat16"),
        (("gpu", "bfloat16", 12, 0.0), "width 12"),
        (("gpu", "bfloat16", 64, 0.1), "dropout"),
    ):
        with pytest.raises(BadInput, match=message):
            choose_kernel("cudnn", *args)
