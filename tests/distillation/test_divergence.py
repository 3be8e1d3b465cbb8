"""The student's losses and gradients against float64 NumPy, in parts, on meshes; their memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config.schema import IGNORE
from jaxgpt.distillation.divergence import Output, distillation_losses
from jaxgpt.ops import cross_entropy as module
from jaxgpt.parallel.rules import AxisRules
from tests.conftest import mesh_of, tiny_config
from tests.ops.test_ops import normal

B, T, D, E, V, KNOWN = 4, 6, 8, 16, 24, 21
RULES = AxisRules()
WEIGHTS = normal(3, B, T, seed=5)
DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "reverse"])


def softcapped(logits, ids):
    return jnp.where(ids < KNOWN, 5 * jnp.tanh(0.7 * logits / 5), -jnp.inf)


def scaled(logits, ids):
    return jnp.where(ids < KNOWN, 0.4 * logits, -jnp.inf)


def arrays():
    """The student's and the teacher's hidden states and tables, and targets."""
    targets = np.random.default_rng(2).integers(0, KNOWN, (B, T))
    targets[0, 2:4] = targets[3, 5] = IGNORE
    student, teacher = (3 * normal(B, T, D), normal(V, D, seed=1)), normal(B, T, E, seed=3)
    return [*student, teacher, normal(V, E, seed=4), targets]


def logsumexp64(logits):
    high = logits.max(-1, keepdims=True)
    return (np.log(np.exp(logits - high).sum(-1, keepdims=True)) + high)[..., 0]


def losses64(x, table, their_x, their_table, targets, temperature, direction):
    ours = 5 * np.tanh(0.7 * (x @ table.T)[..., :KNOWN] / 5)
    theirs = 0.4 * (their_x @ their_table.T)[..., :KNOWN]
    lse = logsumexp64(ours)
    picked = np.take_along_axis(ours, np.maximum(targets, 0)[..., None], -1)[..., 0]
    log_q, log_p = (a / temperature for a in (ours, theirs))
    log_q, log_p = (a - logsumexp64(a)[..., None] for a in (log_q, log_p))
    one, other = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    soft = temperature**2 * np.sum(np.exp(one) * (one - other), -1)
    return [np.where(targets != IGNORE, a, 0) for a in (lse - picked, lse, soft)]


def total64(*args):
    nats, lse, soft = losses64(*args)
    return np.sum(WEIGHTS[0] * nats + WEIGHTS[1] * lse**2 + WEIGHTS[2] * soft)


def split(x, table, their_x, their_table, targets):
    """The arrays as a training step has them, in float32."""
    hidden, vocab = RULES("batch", "seq", None), RULES("vocab", "embed")
    specs = hidden, vocab, hidden, vocab, RULES("batch", "seq")
    floats = [jnp.float32(a) for a in (x, table, their_x, their_table)]
    return [jax.device_put(a, s) for a, s in zip([*floats, targets], specs, strict=True)]


@DIRECTIONS
@pytest.mark.parametrize(
    ("shape", "parts"), [((1, 1, 1), 1), ((1, 1, 1), 3), ((1, 1, 4), 2), ((2, 2, 2), 3)]
)
def test_losses_and_gradients_against_float64(shape, parts, direction, monkeypatch):
    monkeypatch.setattr(module, "parts_for", lambda *a: parts)
    given, temperature = arrays(), 2.0

    def total(x, table, their_x, their_table, targets):
        outputs = Output(x, table, softcapped), Output(their_x, their_table, scaled)
        found = distillation_losses(*outputs, targets, temperature, direction, RULES)
        nats, lse, soft = found
        return jnp.sum(WEIGHTS[0] * nats + WEIGHTS[1] * lse**2 + WEIGHTS[2] * soft), found

    with jax.set_mesh(mesh_of(tiny_config(shape))):
        grad = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))
        grads, found = grad(*split(*given))
        assert grads[1].sharding.spec == RULES("vocab", "embed")
    for got, want in zip(found, losses64(*given, temperature, direction), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
    for i, got in enumerate(grads[:2]):
        along, h = normal(*got.shape, seed=7 + i), 1e-6
        up, down = (
            [a + s * h * along if j == i else a for j, a in enumerate(given)] for s in (1, -1)
        )
        ends = (total64(*moved, temperature, direction) for moved in (up, down))
        want = (next(ends) - next(ends)) / (2 * h)
        np.testing.assert_allclose(np.sum(np.asarray(got) * along), want, rtol=1e-4)
    assert np.all(np.asarray(grads[0])[given[-1] == IGNORE] == 0)
    assert np.all(np.asarray(grads[1])[KNOWN:] == 0), "padding learns nothing"
    assert not any(np.any(np.asarray(g)) for g in grads[2:]), "the teacher learns nothing"


@DIRECTIONS
def test_an_equal_teacher_at_temperature_1_teaches_nothing(direction):
    x, table, *_, targets = arrays()

    def soft(x, table, x2, table2, targets):
        outputs = Output(x, table, softcapped), Output(x2, table2, softcapped)
        found = distillation_losses(*outputs, targets, 1.0, direction, RULES)
        return jnp.sum(found.soft), found.soft

    with jax.set_mesh(mesh_of(tiny_config((1, 1, 4)))):
        grad = jax.jit(jax.grad(soft, argnums=(0, 1), has_aux=True))
        grads, found = grad(*split(x, table, x, table, targets))
    np.testing.assert_allclose(found, 0, atol=1e-6)
    for got in grads:  # of the forward divergence exactly: both are the same exponentials
        np.testing.assert_allclose(got, 0, atol=0 if direction == "forward" else 1e-6)


def test_neither_models_logits_are_ever_whole(monkeypatch):
    """The compiled gradient holds a part of the logits of both, not all of them."""
    x, table, wide = jnp.zeros((4, 64, 8)), jnp.zeros((1024, 8)), jnp.zeros((4, 64, 16))
    targets, their_table = jnp.zeros((4, 64), jnp.int32), jnp.zeros((1024, 16))

    def temporaries(parts):
        monkeypatch.setattr(module, "parts_for", lambda *a: parts)
        plain = functools.partial(lambda a, ids: a)

        def total(x, table):
            outputs = Output(x, table, plain), Output(wide, their_table, plain)
            found = distillation_losses(*outputs, targets, 2.0, "forward", RULES)
            return jnp.sum(found.nats + found.soft)

        with jax.set_mesh(mesh_of(tiny_config())):
            compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * 64 * 1024 * 4
    assert temporaries(1) >= 2 * whole and temporaries(16) < whole / 2


def test_huge_logits_neither_overflow_nor_vanish():
    x, table = jnp.full((1, 2, 1), 1e4), jnp.arange(-64.0, 64)[:, None]

    def run(x, table, targets):
        outputs = Output(x, table, lambda a, ids: a), Output(-x, table, lambda a, ids: a)
        return distillation_losses(*outputs, targets, 1.0, "forward", RULES)

    with jax.set_mesh(mesh_of(tiny_config())):
        nats, _, soft = jax.jit(run)(x, table, jnp.array([[127, 0]]))
    np.testing.assert_allclose(nats, [[0, 127 * 1e4]])
    np.testing.assert_allclose(soft, 127 * 1e4)
