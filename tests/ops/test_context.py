"""Attention whose positions are split over devices equals that of one, value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.ops.attention import xla_attention
from jaxgpt.ops.context import blocks, sharded
from jaxgpt.ops.context.order import to_natural, to_zigzag, zigzag
from jaxgpt.ops.context.splash import splash_gathered, splash_hop
from jaxgpt.ops.kernels import blocked_attention, splash_attention
from jaxgpt.ops.mask import AttentionMask, Reach
from jaxgpt.ops.sparse.patterns import First, Pattern, Window
from tests.ops.test_ops import normal

PLACES = jax.P(None, "context")


def mesh_of(devices: int):
    return jax.make_mesh((devices,), ("context",), devices=jax.devices()[:devices])


def documents(length: int, reach: Reach, packed: bool, prefix=None) -> AttentionMask:
    """Two rows; packed ones have documents that begin anywhere, and positions with them."""
    at = np.tile(np.arange(length), (2, 1))
    if not packed:
        return AttentionMask(jnp.asarray(at), jnp.asarray(at), prefix=prefix, reach=reach)
    starts = np.random.default_rng(0).random((2, length)) < 5 / length
    first = np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    positions, segments = jnp.asarray(at - first), jnp.asarray(np.cumsum(starts, 1))
    return AttentionMask(positions, positions, segments, segments, prefix, reach)


CAUSAL, ALL = Reach(), Reach(causal=False)
WINDOW = Reach(window=7)
PATTERN = Reach(pattern=Pattern((Window(5), First(2)), 0))
SLOW = pytest.mark.slow
PREFIX = jnp.array([9, 30])


@pytest.mark.parametrize(
    ("kernel", "method", "devices", "length", "reach", "packed", "more"),
    [
        ("xla", "ring", 4, 64, CAUSAL, True, ""),
        ("xla", "ring", 4, 64, ALL, True, ""),
        pytest.param("xla", "ring", 2, 24, CAUSAL, False, "", marks=SLOW),
        ("xla", "all_gather", 4, 64, PATTERN, True, ""),
        ("xla", "all_gather", 4, 64, CAUSAL, False, "prefix"),
        ("xla", "all_gather", 4, 32, WINDOW, True, "dropout and bias"),
        ("splash", "ring", 2, 512, CAUSAL, True, ""),
        pytest.param("splash", "ring", 2, 512, ALL, False, "", marks=SLOW),
        ("splash", "all_gather", 2, 512, Reach(window=100), True, ""),
    ],
)
def test_split_positions_change_nothing(
    kernel, method, devices, length, reach, packed, more, monkeypatch
):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    interpreted = splash_hop(interpret=True), functools.partial(splash_gathered, interpret=True)
    monkeypatch.setitem(sharded.OVER_CONTEXT, splash_attention, interpreted)
    mask = documents(length, reach, packed, PREFIX if more == "prefix" else None)
    q, k, v, target = (
        jnp.asarray(normal(2, length, heads, 8, seed=s), jnp.float32)
        for s, heads in enumerate((4, 2, 2, 4))
    )
    given = {}
    if more == "dropout and bias":
        given["kept"] = jax.random.bernoulli(jax.random.key(0), 0.5, (2, 4, length, length))
        given["bias"] = jnp.asarray(normal(1, 4, length, length), jnp.float32)

    def of_one(q, k, v, bias):
        arguments = given | ({} if bias is None else {"bias": bias})
        out = xla_attention(q, k, v, mask, **arguments, scale=0.3, dropout=0.5)
        return jnp.sum(out * target), out

    attend = sharded.over_context(
        {"xla": blocked_attention, "splash": splash_attention}[kernel],
        method,
        scale=0.3,
        **({"dropout": 0.5} if given else {}),
    )

    def local(q, k, v, mask, given):
        if not reach.causal:
            return attend(q, k, v, mask, **given)
        q, k, v = (to_zigzag(a, 1) for a in (q, k, v))
        mask = jax.tree.map(lambda a: to_zigzag(a, 1) if a.ndim > 1 else a, mask)
        given = {name: to_zigzag(a, 2) for name, a in given.items()}
        return to_natural(attend(q, k, v, mask, **given), 1)

    def of_many(q, k, v, bias):
        arguments = given | ({} if bias is None else {"bias": bias})
        rows = jax.tree.map(lambda a: PLACES if a.ndim > 1 else jax.P(), mask)
        each = {name: jax.P(None, None, "context") for name in arguments}
        specs = (PLACES,) * 3 + (rows, each)
        run = jax.shard_map(local, in_specs=specs, out_specs=PLACES, check_vma=False)
        out = run(*jax.sharding.reshard((q, k, v, mask, arguments), specs))
        return jnp.sum(out * target), out

    argnums = (0, 1, 2, 3) if given else (0, 1, 2)

    def outcome(f):
        run = jax.jit(jax.value_and_grad(f, argnums, has_aux=True))
        (_, out), grads = run(q, k, v, given.get("bias"))
        return jax.device_get((out, grads))

    expected = outcome(of_one)
    with jax.set_mesh(mesh_of(devices)):
        found = outcome(of_many)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_zigzag_gives_each_device_an_early_and_a_late_chunk():
    assert zigzag(np.arange(8), 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
