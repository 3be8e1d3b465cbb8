"""Products in 8 bits against float64, within the bounds of their rounding."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxgpt.config.validate import changed
from jaxgpt.parallel.fsdp import product
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parameters.low_precision import FP8, INT8, check_device
from jaxgpt.system.errors import BadInput
from tests.conftest import mesh_of, tiny_config

# Rounding of a number, over the largest of its scale: half a step of 127; half a unit in the last
# of 3 (e4m3) or 2 (e5m2) bits after the leading one
ROUNDING = {INT8: (0.5 / 127, 0.5 / 127), FP8: (2**-4, 2**-3)}
FLOAT8 = (ml_dtypes.float8_e4m3fn, 240), (ml_dtypes.float8_e5m2, 57344)


def cut(kind, a, axis: int, grad: bool = False):
    """What is left of `a` in 8 bits, in float64."""
    dtype, most = (np.int8, 127) if kind is INT8 else FLOAT8[grad]
    largest = np.abs(a).max(axis, keepdims=True)
    scale = np.where(largest == 0, 1, largest / most)
    codes = np.rint(a / scale) if kind is INT8 else a / scale
    return codes.astype(np.float32).astype(dtype).astype(np.float64) * scale


@functools.cache
def step(kind):
    """The compiled function of y and the gradients of x and w."""

    @jax.jit
    def products(x, w, grad_y):
        out = jax.typeof(grad_y).sharding.spec
        y, back = jax.vjp(lambda x, w: product("MI,IO->MO", x, w, out, AxisRules(), kind), x, w)
        return y, *back(grad_y)

    return products


WHOLE = P(None, None, None), P(None, None), P(None, None, None)


def run(kind, x, w, grad_y, specs=WHOLE):
    """Returns y and the gradients of x and w."""
    given = zip((x, w, grad_y), specs, strict=True)
    found = step(kind)(*(jax.device_put(np.float32(a), spec) for a, spec in given))
    return [np.asarray(a, np.float64) for a in found]


def drawn(seed: int, spread: float, shape=(2, 3, 8, 4)):
    """x [B, T, I], w [I, O] and y's gradient: rows and columns differ `spread` powers of ten."""
    rng = np.random.default_rng(seed)
    b, t, i, o = shape
    shapes = (b, t, i), (i, o), (b, t, o)
    return [
        np.float32(rng.normal(size=s) * 10 ** (spread * rng.uniform(-1, 1, (*s[:-1], 1))))
        for s in shapes
    ]


@pytest.mark.parametrize("kind", [INT8, FP8], ids=["int8", "fp8"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.0, 1.0, 3.0]))
def test_against_float64(kind, seed, spread):
    """Each of the three products is that of the factors in 8 bits, and as near to the float one as
    their rounding lets it be."""
    x, w, g = (a.astype(np.float64) for a in drawn(seed, spread))
    with jax.set_mesh(mesh_of(tiny_config())):
        y, grad_x, grad_w = run(kind, x, w, g)
    rows = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    xq, wq = cut(kind, x, -1), cut(kind, w, 0)
    x_step, w_step = np.abs(x).max(-1, keepdims=True), np.abs(w).max(0, keepdims=True)
    gw = cut(kind, g * w_step, -1, True) / w_step
    gx = cut(kind, rows(g * x_step), 0, True) / rows(x_step)
    near = dict(rtol=1e-5)
    for got, want in ((y, xq @ wq), (grad_x, gw @ wq.T), (grad_w, rows(xq).T @ gx)):
        # A number at a tie between two codes may go to either: few do, by no more than the bound
        assert np.mean(np.isclose(got, want, atol=1e-5 * np.abs(want).max(), **near)) > 0.7
    r, s = ROUNDING[kind]

    def bound(a, b, a_error, b_error):
        return a_error @ np.abs(b) + np.abs(a) @ b_error + a_error @ b_error

    xe, we = np.broadcast_to(r * x_step, x.shape), np.broadcast_to(r * w_step, w.shape)
    gwe = s * np.abs(g * w_step).max(-1, keepdims=True) / w_step
    gxe = s * np.abs(rows(g * x_step)).max(0, keepdims=True) / rows(x_step)
    for got, want, most in (
        (y, x @ w, bound(x, w, xe, we)),
        (grad_x, g @ w.T, bound(g, w.T, gwe, we.T)),
        (grad_w, rows(x).T @ rows(g), bound(rows(x).T, rows(g), rows(xe).T, gxe)),
    ):
        assert np.all(np.abs(got - want) <= 1.001 * most + 1e-6 * np.abs(want).max())


@pytest.mark.parametrize("kind", [INT8, FP8], ids=["int8", "fp8"])
def test_sharded_equals_one_device(kind):
    """y and x's gradient to rounding of floats. Each device cuts w's gradient by the largest of its
    own rows: equal where they are equal, as here."""
    x, w, g = drawn(0, 1.0, (8, 4, 16, 8))
    g, x = np.tile(g[:2], (4, 1, 1)), np.tile(x[:2], (4, 1, 1))
    specs = (
        P(("data", "fsdp"), None, None),
        P("fsdp", "tensor"),
        P(("data", "fsdp"), None, "tensor"),
    )
    across = (
        P(("data", "fsdp"), None, "tensor"),
        P("tensor", "fsdp"),
        P(("data", "fsdp"), None, None),
    )
    scattered = (*across[:2], P(("data", "fsdp"), "tensor", None))  # mesh.sequence_activations
    with jax.set_mesh(mesh_of(tiny_config())):
        want = run(kind, x, w, g)
    for splits in (specs, across, scattered):
        with jax.set_mesh(mesh_of(tiny_config((2, 2, 2)))):
            got = run(kind, x, w, g, splits)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("kind", [INT8, FP8])
def test_codes_are_the_same_where_a_checkpoint_keeps_them(kind):
    x, w, _ = drawn(0, 1.0, (2, 4, 16, 8))
    out = P(None, None, None)

    def total(x, w):
        return jnp.sum(jnp.sin(product("MI,IO->MO", x, w, out, AxisRules(()), kind)))

    with jax.set_mesh(mesh_of(tiny_config())):
        kept = jax.checkpoint(total, policy=jax.checkpoint_policies.everything_saveable)
        found, wanted = (jax.jit(jax.grad(f, (0, 1)))(x, w) for f in (kept, total))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_sums_beyond_32_bits():
    """Of more products than int32 holds at 127 times 127, codes are smaller."""
    rows = 150_000
    with jax.set_mesh(mesh_of(tiny_config())):
        ones = np.ones((1, rows, 1), np.float32)
        _, _, grad_w = run(INT8, ones, np.ones((1, 1)), ones)
    np.testing.assert_allclose(grad_w, rows, rtol=1e-6)


def test_what_it_cannot_go_with_is_said():
    config = tiny_config()
    for values, message in (
        ({"compute.dtype": "float16"}, "compute.matmul='int8' with compute.dtype='float16'"),
        ({"compute.fake_quantise": "int4"}, "with compute.fake_quantise='int4'"),
        ({"shrink.weights": "int4", "lora.rank": 2}, "with shrink.weights='int4'"),
        ({"model.num_experts": 4}, "with model.num_experts=4"),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            changed(config, {"compute.matmul": "int8"} | values)
    check_device("fp8", SimpleNamespace(device_kind="NVIDIA H200", compute_capability="9.0"))
    for old in ({"device_kind": "TPU v5"}, {"device_kind": "A100", "compute_capability": "8.0"}):
        check_device("int8", SimpleNamespace(**old))
        with pytest.raises(BadInput, match="compute.matmul=fp8: a .* does not multiply float8"):
            check_device("fp8", SimpleNamespace(**old))


@pytest.mark.parametrize("matmul", [INT8, FP8])
def test_copies_of_a_weight_have_the_codes_of_one(matmul):
    """Stages multiply by [devices, I, O]: a scale for each column of a copy, not one for each
    number of equal copies."""
    kernel = jax.random.normal(jax.random.key(0), (8, 6))
    one, two = (matmul.weight(a, kernel.dtype) for a in (kernel, jnp.stack([kernel, kernel])))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(jnp.stack([a, a]), b)
