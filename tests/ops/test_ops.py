"""Pure functions against float64 NumPy, value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.ops.context.frequencies import attention_factor, rope_frequencies
from jaxgpt.ops.norm import layer_norm, rms_norm
from jaxgpt.ops.remat import scan_layers
from jaxgpt.ops.rope import rotate, sinusoids
from tests.conftest import mesh_of, tiny_config


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


@pytest.mark.parametrize(
    ("betas", "expected"),
    [
        ((32.0, 1.0), [1, 0.3162278, 0.1, 0.02569351, 0.00625, 0.001383497, 0.00025, 7.905695e-05]),
        ((8.0, 2.0), [1, 0.3162278, 0.1, 0.03162278, 0.0075, 0.001581139, 0.00025, 7.905695e-05]),
    ],
)
def test_yarn_is_that_of_transformers(betas, expected):
    """What 5.0's `ROPE_INIT_FUNCTIONS["yarn"]` returns for these sizes."""
    found = rope_frequencies(16, 1e4, "yarn", 4.0, 4096, betas)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert attention_factor(4.0) == pytest.approx(1.138629436111989)
    assert attention_factor(4.0) / attention_factor(4.0, 0.5) == pytest.approx(1.0648216253695715)
    x = jnp.asarray(normal(1, 3, 2, 16), jnp.float32)
    given = x, jnp.arange(3)[None], tuple(found)
    np.testing.assert_allclose(rotate(*given, 1.5), 1.5 * rotate(*given), rtol=1e-6)


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


def test_full_remat_equals_a_checkpointed_scan_to_the_bit_with_narrow_gradients():
    """Float32 kernels in bfloat16 products, a router that is float32 throughout, an array that all
    layers read, integers, keys."""

    def apply(x, turn, rest):
        (params, key), (positions, bias) = turn, rest
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        x = x + kept * jnp.tanh(x @ params["up"]["kernel"].astype(x.dtype))
        weight = jnp.tanh(x.astype(jnp.float32) @ params["router"]["kernel"])
        x = x + (weight + bias * params["scale"] + positions[..., None] / 8).astype(x.dtype)
        return x, {"loss": jnp.sum(weight)}

    rng = np.random.default_rng(0)
    kernels = jnp.asarray(rng.normal(size=(2, 3, 8, 8)), jnp.float32) / 3
    params = {
        "up": {"kernel": kernels[0]},
        "router": {"kernel": kernels[1]},
        "scale": jnp.asarray(rng.normal(size=(3, 8)), jnp.float32),
    }
    x, bias = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.bfloat16), jnp.ones(8)
    keys, positions = jax.random.split(jax.random.key(0), 3), jnp.arange(8).reshape(2, 4)

    def total(remat: str, params, x, bias):
        turns, rest = (params, keys), (positions, bias)
        x, y = scan_layers(apply, x, turns, rest, remat=remat, unroll=1)
        return jnp.sum(jnp.square(x.astype(jnp.float32))) + jnp.sum(y["loss"])

    def gradients(remat: str):
        return jax.value_and_grad(functools.partial(total, remat), (0, 1, 2))

    remats = ("full", "none")
    with jax.set_mesh(mesh_of(tiny_config())):
        found, wanted = (jax.jit(gradients(remat))(params, x, bias) for remat in remats)
        text = str(jax.make_jaxpr(gradients("full"))(params, x, bias))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert "bf16[3,8,8]" in text, "the stack of gradients"
