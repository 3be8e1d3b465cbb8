"""Cross-entropy against float64 NumPy, in parts, on meshes; and what it keeps in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config.schema import IGNORE
from jaxgpt.ops import cross_entropy as module
from jaxgpt.ops.cross_entropy import cross_entropy, parts_for
from jaxgpt.parallel.rules import AxisRules
from tests.conftest import mesh_of, tiny_config
from tests.ops.test_ops import normal

B, T, D, V, KNOWN = 4, 6, 8, 24, 21
RULES = AxisRules()


def softcapped(logits, ids):
    return jnp.where(ids < KNOWN, 5 * jnp.tanh(0.7 * logits / 5), -jnp.inf)


def arrays():
    x, table = 3 * normal(B, T, D), normal(V, D, seed=1)
    targets = np.random.default_rng(2).integers(0, KNOWN, (B, T))
    targets[0, 2:4] = targets[3, 5] = IGNORE
    return x, table, targets


def losses64(x, table, targets):
    raw = 0.7 * x @ table.T
    logits = 5 * np.tanh(raw / 5)
    logits[..., KNOWN:] = -np.inf
    high = logits.max(-1)
    lse = np.log(np.exp(logits - high[..., None]).sum(-1)) + high
    picked = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    counted = targets != IGNORE
    return np.where(counted, lse - picked, 0), np.where(counted, lse, 0)


WEIGHTS = normal(2, B, T, seed=5)


def total64(x, table, targets):
    nats, lse = losses64(x, table, targets)
    return np.sum(WEIGHTS[0] * nats + WEIGHTS[1] * lse**2)


def split(x, table, targets):
    """The arrays as a training step has them, in float32."""
    specs = RULES("batch", "seq", None), RULES("vocab", "embed"), RULES("batch", "seq")
    floats = jnp.float32(x), jnp.float32(table), jnp.asarray(targets)
    return [jax.device_put(a, spec) for a, spec in zip(floats, specs, strict=True)]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 2)])
def test_losses_and_gradients_against_float64(shape, parts, monkeypatch):
    monkeypatch.setattr(module, "parts_for", lambda *a: parts)
    x, table, targets = arrays()

    def total(x, table, targets):
        nats, lse = cross_entropy(x, table, targets, softcapped, RULES)
        return jnp.sum(WEIGHTS[0] * nats + WEIGHTS[1] * lse**2), (nats, lse)

    with jax.set_mesh(mesh_of(tiny_config(shape))):
        grad = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
        grads, found = grad(*split(x, table, targets))
        assert grads[1].sharding.spec == RULES("vocab", "embed")
    for got, want in zip(found, losses64(x, table, targets), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for i, got in enumerate(grads):
        along, h = normal(*got.shape, seed=7 + i), 1e-6
        moved = [
            [a + s * h * along if j == i else a for j, a in enumerate((x, table))] for s in (1, -1)
        ]
        want = (total64(*moved[0], targets) - total64(*moved[1], targets)) / (2 * h)
        np.testing.assert_allclose(np.sum(np.asarray(got) * along), want, rtol=1e-4)
    assert np.all(np.asarray(grads[0])[targets == IGNORE] == 0)
    assert np.all(np.asarray(grads[1])[KNOWN:] == 0), "padding learns nothing"


def test_logits_are_never_whole(monkeypatch):
    """The compiled gradient holds one part of the logits, not all of them."""
    x, table = jnp.zeros((4, 64, 8)), jnp.zeros((1024, 8))
    targets = jnp.zeros((4, 64), jnp.int32)

    def temporaries(parts):
        monkeypatch.setattr(module, "parts_for", lambda *a: parts)

        def total(x, table):
            return jnp.sum(cross_entropy(x, table, targets, lambda a, ids: a, RULES)[0])

        with jax.set_mesh(mesh_of(tiny_config())):
            compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * 64 * 1024 * 4
    assert temporaries(1) >= whole > 2 * temporaries(8)


def test_huge_logits_neither_overflow_nor_vanish():
    x, table = jnp.full((1, 2, 1), 1e4), jnp.arange(-64.0, 64)[:, None]
    with jax.set_mesh(mesh_of(tiny_config())):
        run = functools.partial(cross_entropy, finish=lambda a, ids: a, rules=RULES)
        nats, lse = jax.jit(run)(x, table, jnp.array([[127, 0]]))
    np.testing.assert_allclose(nats, [[0, 127 * 1e4]])
    np.testing.assert_allclose(lse, 63 * 1e4)


@pytest.mark.parametrize("size", [80.0, 90.0, 1e4])
def test_gradients_stay_finite_where_an_uncounted_target_has_large_logits(size):
    """exp(89) overflows in float32; a target that is not counted must not bring that in."""
    x = size * jnp.ones((1, 2, 1))
    table = jnp.linspace(-1, 1, 128)[:, None]
    targets = jnp.array([[IGNORE, 127]])

    def total(x, table):
        nats, lse = cross_entropy(x, table, targets, lambda a, ids: a, RULES)
        return jnp.sum(nats) + 1e-3 * jnp.sum(lse**2)

    with jax.set_mesh(mesh_of(tiny_config())):
        of_x, of_table = jax.jit(jax.grad(total, argnums=(0, 1)))(x, table)
    assert np.all(np.isfinite(of_table)) and np.all(np.isfinite(of_x))
    assert np.all(of_x[0, 0] == 0) and np.any(of_table != 0)


def test_number_of_parts():
    assert parts_for(8 * 256, 4096, "cpu") == 4
    assert parts_for(8 * 256, 4096, "tpu") == 1
    assert parts_for(8 * 1024, 50304, "tpu") == 8
    assert parts_for(10**9, 7, "tpu") == 7, "at most an id each"
    assert parts_for(8 * 256, 4002, "cpu") == 6, "parts are equal"
