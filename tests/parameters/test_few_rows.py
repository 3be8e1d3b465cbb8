"""Products that read few bits, against NumPy in float64, and what they keep in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxgpt.parameters import few_rows
from jaxgpt.parameters.quantised import Format
from jaxgpt.parameters.weights import QuantisedTable, in_few_bits
from tests.conftest import mesh_of, tiny_config
from tests.parameters.test_quantised import back

FORMATS = [("int8", 0), ("int8", 32), ("int4", 0), ("int4", 32)]


def problem(fmt: Format, inputs: int, outputs: int, rows: int):
    """x, the stored matrix, and their product."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((rows, inputs)).astype(np.float32)
    values, scales = fmt.quantise(rng.standard_normal((inputs, outputs)), -2)
    want = np.float64(x) @ np.float64(back(fmt, values, scales, -2, inputs))
    return x, {"values": values, "scales": scales}, want


@pytest.mark.parametrize("kind, group", FORMATS)
def test_it_is_the_product_with_the_weights_that_are_meant(kind, group):
    fmt = Format(kind, group)
    x, stored, want = problem(fmt, inputs=192, outputs=40, rows=2)
    got = jax.jit(lambda x, stored: few_rows.multiply(fmt, x, **stored))(x, stored)
    np.testing.assert_allclose(got, want, atol=6e-5)  # float32 sums of 192 products up to 30


def test_it_sums_whole_blocks_or_does_not_apply():
    assert few_rows.block_size(Format("int8"), 100) == 25
    assert few_rows.block_size(Format("int4"), 100) == 20  # whole bytes
    assert few_rows.block_size(Format("int4", 64), 192) == 64
    for fmt, inputs in (
        (Format("int8"), 101),
        (Format("int4", 32), 100),
        (Format("int4"), 15),
        (Format("nf4", 32), 96),
    ):
        assert few_rows.block_size(fmt, inputs) == 0


@pytest.mark.parametrize("kind, rows", [("int8", 1), ("int8", 3), ("int4", 1), ("int4", 3)])
def test_a_loop_over_tokens_keeps_no_floats_of_the_weights(kind, rows, monkeypatch):
    """XLA would compute what no step changes once, in front of the loop."""
    monkeypatch.setattr(few_rows, "PANEL", 128)
    fmt, width = Format(kind, 32), 1024
    x, stored, want = problem(fmt, width, width, rows)

    def as_floats(x, values, scales):
        w = fmt.dequantise(values, scales, axis=-2, inputs=width, dtype=x.dtype)
        return jnp.einsum("BTI,IO->BTO", x, w)

    def tokens(x, stored):
        def token(x, _):
            y = first = in_few_bits(fmt, x[None], stored[0], P(None, None, None), as_floats)
            for matrix in stored[1:]:
                y = in_few_bits(fmt, y, matrix, P(None, None, None), as_floats)
            return y[0] / jnp.max(jnp.abs(y)), first[0]

        return jax.lax.scan(token, x, length=4)[1][0]

    with jax.set_mesh(mesh_of(tiny_config())):
        program = jax.jit(tokens).lower(x, [stored] * 3).compile()
    np.testing.assert_allclose(program(x, [stored] * 3), want, atol=2e-4)
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * width * 128 * 4


def test_the_floats_of_a_panel_wait_for_what_comes_before_it(monkeypatch):
    """Or XLA makes those of all matrices first (with the flags of a run, not `conftest`'s). What
    they wait for is seen where the factor of their scales shows it."""
    monkeypatch.setattr(few_rows, "PANEL", 8)
    monkeypatch.setattr(few_rows, "_one_after", lambda known: 1 + known[0, 0, 0])
    stored = {"values": jnp.ones((4, 24), jnp.int8), "scales": jnp.ones((1, 24))}

    def scales(x, values, scales):
        return jnp.broadcast_to(scales, (1, 3, 8))

    got = few_rows.multiply_panels(scales, jnp.ones((1, 3, 4)), stored)
    np.testing.assert_array_equal(got[0, 0, ::8], [2, 3, 4])


@pytest.mark.parametrize("first", [1, np.nan, np.inf])
def test_what_a_panel_waits_with_is_1_whatever_a_row_holds(first):
    """A NaN in one row changes no other's scales, and XLA does not see that it is 1."""
    x = jnp.full((2, 1, 4), first, jnp.float32)
    program = jax.jit(few_rows._one_after).lower(x).compile()
    assert program(x) == 1 and "compare(" in program.as_text()


@pytest.mark.parametrize("rows", [1, 20])
def test_a_table_for_decoding_is_the_table(rows):
    """Its logits and its rows, for one row, which reads the few bits, and for more."""
    fmt, shape = Format("int4", 32), (96, 64)
    rng = np.random.default_rng(6)
    values, scales = fmt.quantise(rng.standard_normal(shape), -1)
    weights = np.float64(back(fmt, values, scales, -1, shape[1]))
    x = jnp.asarray(rng.standard_normal((rows, shape[1])), jnp.float32)
    ids = jnp.asarray(rng.integers(0, shape[0], (1, rows)))
    with jax.set_mesh(mesh_of(tiny_config())):
        storage = QuantisedTable(shape, fmt, -2)
        table = storage.make(nnx.Rngs(0), P(None, None), 0.0)
        table.values[...], table.scales[...] = jnp.asarray(values.T), jnp.asarray(scales.T)
        logits = storage.few_logits(x, storage.whole(table, "float32"), P(None, None))
        looked_up = storage.lookup(table, ids, jnp.float32, P(None, None, None))
    np.testing.assert_allclose(logits, np.float64(x) @ weights.T, atol=2e-5)
    np.testing.assert_allclose(looked_up[0], weights[ids[0]], rtol=1e-6)
