"""Every attention kernel against float64 NumPy, value and gradient; and which one is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model.spec import choose_kernel
from jaxgpt.ops import kernels
from jaxgpt.ops.attention import xla_attention
from jaxgpt.ops.kernels import blocked_attention, splash_attention
from jaxgpt.ops.mask import AttentionMask, Reach
from jaxgpt.system.errors import BadInput
from tests.ops.test_ops import normal


def numeric_gradient(f, x, along):
    """df/dx . along by central differences, in float64."""
    h = 1e-6
    return (f(x + h * along) - f(x - h * along)) / (2 * h)


def attention64(q, k, v, mask, scale):
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        here, keys = mask.q_positions[b, t], mask.kv_positions[b]
        seen = keys <= here if mask.reach.causal else keys >= 0
        if mask.reach.window:
            seen &= abs(keys - here) < mask.reach.window
        if mask.prefix is not None:
            seen |= keys < mask.prefix[b]
        if mask.q_segments is not None:
            seen &= mask.kv_segments[b] == mask.q_segments[b, t]
        scores = scale * k[b, seen, n // group] @ q[b, t, n]
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


def long(length, documents=0):
    """Positions over more than one block; documents begin anywhere."""
    rows = np.tile(np.arange(length), (2, 1))
    if not documents:
        return AttentionMask(rows, rows)
    starts = np.sort(np.random.default_rng(0).integers(1, length, (2, documents)))
    segments = np.array([np.searchsorted(s, r, "right") for s, r in zip(starts, rows)])
    return AttentionMask(rows, rows, segments, segments)


PLAIN = AttentionMask(np.tile(np.arange(7), (2, 1)), np.tile(np.arange(7), (2, 1)))
PACKED = np.array([[0, 0, 0, 1, 1, 1, 1], [5, 6, 6, 6, 6, 6, 0]])
RESTART = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 0]])
CROSS = AttentionMask(  # a decoder's three tokens, an encoder's 150, of which one row pads 50
    np.tile(np.arange(3), (2, 1)),
    np.tile(np.arange(150), (2, 1)),
    np.ones((2, 3), int),
    (np.arange(150) < np.array([[150], [100]])).astype(int),
    reach=Reach(causal=False),
)
CASES = {
    "cross": (CROSS, 1, 0),
    "causal": (PLAIN, 3, 0),
    "grouped-query": (PLAIN, 1, 0),
    "window": (PLAIN, 3, 2),
    "packed": (AttentionMask(RESTART, RESTART, PACKED, PACKED), 3, 0),
    "packed window": (AttentionMask(RESTART, RESTART, PACKED, PACKED), 1, 3),
    "blocks": (long(150), 1, 0),
    "window over blocks": (long(150), 3, 30),
    "packed over blocks": (long(150, 4), 3, 0),
    "cached": (AttentionMask(np.array([[0, 1, 2], [4, 5, 6]]), PLAIN.kv_positions), 3, 0),
    "all": (PLAIN._replace(reach=Reach(causal=False)), 1, 0),
    "all in a window, over blocks": (long(150, 3)._replace(reach=Reach(causal=False)), 1, 20),
    "prefix": (PLAIN._replace(prefix=np.array([3, 0])), 3, 0),
    "prefix, packed": (
        AttentionMask(RESTART, RESTART, PACKED, PACKED, prefix=np.array([2, 3])),
        1,
        2,
    ),
}


LAST = ("blocks", "packed over blocks")  # splash reads a width of 16 with positions last
KERNELS = {
    "xla": xla_attention,
    "blocked": blocked_attention,
    "splash": functools.partial(splash_attention, interpret=True),
}


@pytest.mark.parametrize(
    ("kernel", "name", "width"),  # neither a cache nor a prefix is splash's to read
    [
        (k, n, 16 if k == "splash" and n in LAST else 5)
        for k in KERNELS
        for n in CASES
        if k != "splash" or not n.startswith(("cached", "prefix"))
    ],
)
def test_attention_against_float64(kernel, name, width, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 128)
    mask, kv_heads, window = CASES[name]
    mask = mask.within(window)
    q = normal(2, mask.q_positions.shape[1], 3, width)
    k, v = (normal(2, mask.kv_positions.shape[1], kv_heads, width, seed=s) for s in (1, 2))
    target = normal(*q.shape, seed=9)
    ours = functools.partial(KERNELS[kernel], mask=jax.tree.map(jnp.asarray, mask), scale=0.3)
    args = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    np.testing.assert_allclose(ours(*args), attention64(q, k, v, mask, 0.3), atol=1e-6)
    grads = jax.grad(lambda *a: jnp.sum(ours(*a) * target), argnums=(0, 1, 2))(*args)
    for i, grad in enumerate(grads):
        along = normal(*args[i].shape, seed=20 + i)

        def value(x, i=i):
            moved = [x if j == i else a for j, a in enumerate((q, k, v))]
            return np.sum(attention64(*moved, mask, 0.3) * target)

        want = numeric_gradient(value, (q, k, v)[i], along)
        np.testing.assert_allclose(np.sum(np.asarray(grad) * along), want, rtol=1e-5, atol=1e-5)


def test_attention_dropout_keeps_what_it_is_told():
    q, k, v = (jnp.asarray(normal(1, 4, 2, 8, seed=s), jnp.float32) for s in range(3))
    mask = AttentionMask(jnp.arange(4)[None], jnp.arange(4)[None])
    kept = jnp.ones((1, 2, 4, 4), bool).at[:, 1].set(False)
    whole = xla_attention(q, k, v, mask, scale=1.0)
    half = xla_attention(q, k, v, mask, kept, scale=1.0, dropout=0.5)
    np.testing.assert_allclose(half[:, :, 0], 2 * whole[:, :, 0], 1e-6)
    assert np.all(np.asarray(half[:, :, 1]) == 0), "head 1 keeps nothing"


def test_a_bias_is_added_to_the_scores():
    """As further inputs of queries and keys would: query t has 1 in its t-th, key s the bias."""
    q, k, v = (normal(2, 5, 3, 8, seed=s) for s in range(3))
    bias = normal(2, 3, 5, 5, seed=4)
    ones = np.broadcast_to(np.eye(5)[None, :, None], (2, 5, 3, 5))
    wide = np.concatenate([q, ones], -1), np.concatenate([k, bias.transpose(0, 3, 1, 2) / 0.3], -1)
    mask = AttentionMask(*(np.tile(np.arange(5), (2, 1)),) * 2, reach=Reach(causal=False))
    want = attention64(*wide, np.concatenate([v, ones], -1), mask, 0.3)[..., :8]
    arrays = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
    mask, bias = jax.tree.map(jnp.asarray, mask), jnp.asarray(bias, jnp.float32)
    np.testing.assert_allclose(
        blocked_attention(*arrays, mask, bias=bias, scale=0.3), want, atol=1e-6
    )


@pytest.mark.parametrize("window", [0, 30])
def test_blocks_with_dropout_are_the_reference(window):
    q, k, v = (normal(2, 150, heads, 8, seed=s) for s, heads in enumerate((4, 2, 2)))
    q, k, v, target = (jnp.asarray(a, jnp.float32) for a in (q, k, v, normal(*q.shape, seed=9)))
    mask = jax.tree.map(jnp.asarray, long(150, 3)).within(window)
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, (2, 4, 150, 150))
    rows = 2 if window else 1  # a bias of each row, or of all
    bias = jnp.asarray(normal(rows, 4, 150, 150), jnp.float32)

    def outcome(attend):
        def run(q, k, v, bias):
            return attend(q, k, v, mask, kept, bias, scale=0.3, dropout=0.5)

        gradient = jax.grad(lambda *a: jnp.sum(run(*a) * target), argnums=(0, 1, 2, 3))
        return run(q, k, v, bias), gradient(q, k, v, bias)

    found, expected = outcome(blocked_attention), outcome(xla_attention)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize("length, window, most", [(512, 0, 0.6), (2048, 0, 0.6), (512, 64, 0.3)])
def test_blocks_skip_the_keys_that_no_query_sees(length, window, most):
    q = jnp.zeros((1, length, 1, 64))
    positions = jnp.arange(length)[None]
    mask = AttentionMask(positions, positions).within(window)

    def flops(attend):
        run = jax.jit(functools.partial(attend, scale=1.0))
        return run.lower(q, q, q, mask).compile().cost_analysis()["flops"]

    assert flops(blocked_attention) < most * flops(xla_attention)


def test_splash_refuses_a_prefix():
    q = jnp.zeros((2, 7, 1, 8))
    with pytest.raises(BadInput, match="prefix"):
        splash_attention(q, q, q, PLAIN._replace(prefix=jnp.array([3, 0])), scale=1.0)


def test_kernel_choice():
    assert choose_kernel("auto", "cpu", "bfloat16", 64) == "xla"
    assert choose_kernel("auto", "gpu", "bfloat16", 64) == "cudnn"
    assert choose_kernel("auto", "gpu", "float32", 64) == "xla"
    assert choose_kernel("auto", "gpu", "bfloat16", 64, "model.dropout=0.1") == "xla"
    assert choose_kernel("xla", "gpu", "bfloat16", 64) == "xla"
    assert choose_kernel("auto", "tpu", "float32", 80) == "splash"
    assert choose_kernel("auto", "tpu", "bfloat16", 64, "model.dropout=0.1") == "xla"
    for name, args, message in (
        ("cudnn", ("cpu", "bfloat16", 64), "devices are cpu, not gpu"),
        ("splash", ("gpu", "bfloat16", 64), "devices are gpu, not tpu"),
        ("splash", ("tpu", "bfloat16", 64, "model.dropout=0.1"), "dropout"),
        ("cudnn", ("gpu", "float32", 64), "float32 is not a 16-bit float"),
        ("cudnn", ("gpu", "bfloat16", 12), "width 12"),
        ("cudnn", ("gpu", "bfloat16", 64, "model.dropout=0.1"), "dropout"),
    ):
        with pytest.raises(BadInput, match=message):
            choose_kernel(name, *args)


def test_a_query_that_sees_no_key_has_no_gradient():
    """Of padding, for example, beside a source without tokens."""
    q, k, v = (jnp.float32(normal(2, n, 2, 8, seed=i)) for i, n in enumerate((5, 9, 9)))
    bias = jnp.float32(normal(1, 2, 5, 9, seed=3))
    positions = [np.tile(np.arange(length), (2, 1)) for length in (5, 9)]
    parts = *positions, np.full((2, 5), 7), np.ones((2, 9), int)
    mask = AttentionMask(*map(jnp.asarray, parts), reach=Reach(False))

    def gradients(attend):
        def loss(q, k, v, bias):
            return jnp.sum(attend(q, k, v, mask, bias=bias, scale=0.3) ** 2)

        return jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias)

    for got, want in zip(gradients(blocked_attention), gradients(xla_attention), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
