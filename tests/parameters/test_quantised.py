"""Matrices in few bits: error bounds as properties, the bytes themselves, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.parameters.quantised import LARGEST, LEVELS, NF4, Format
from tests.conftest import mesh_of, tiny_config
from tests.ops.test_ops import normal

# of a scale: the largest distance of a weight from the nearest of its levels
REACH = {"int8": 0.5, "int4": 0.5, "nf4": float(np.max(np.diff(NF4))) / 2}


def back(fmt: Format, values, scales, axis: int, inputs: int) -> np.ndarray:
    """The weights, by NumPy alone."""
    codes = np.asarray(values)
    if fmt.kind != "int8":
        codes = np.moveaxis(codes, axis, 0)
        codes = np.stack([codes % 16, codes // 16], axis=1).reshape(-1, *codes.shape[1:])[:inputs]
        codes = LEVELS[fmt.kind][np.moveaxis(codes, 0, axis)]
    return np.float32(codes) * spread(scales, fmt.group, axis, inputs)


def spread(scales: np.ndarray, group: int, axis: int, inputs: int) -> np.ndarray:
    scales = np.repeat(np.asarray(scales, np.float32), group or inputs, axis=axis)
    return np.take(scales, np.arange(inputs), axis=axis)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(REACH)),
    st.sampled_from([0, 4, 32]),
    st.sampled_from([-1, -2]),
    st.tuples(st.integers(1, 2), st.integers(1, 41), st.integers(1, 41)),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    st.integers(0, 2**32 - 1),
)
def test_no_weight_is_further_than_half_a_step_from_its_own(kind, group, axis, shape, size, seed):
    """Of any shape, also where the group or the byte is not filled, and with rows of zeros."""
    w = size * np.random.default_rng(seed).standard_t(2, shape).astype(np.float32)
    w[:, : shape[1] // 3] = 0
    fmt = Format(kind, group)
    values, scales = fmt.quantise(w, axis)
    size_of = fmt.sizes(shape[axis])
    assert (values.shape[axis], scales.shape[axis]) == size_of
    got = back(fmt, values, scales, axis, shape[axis])
    assert got.shape == w.shape
    steps = spread(scales, group, axis, shape[axis])
    assert np.all(np.abs(w) <= steps * LARGEST[kind] * (1 + 1e-6)), "clipped"
    assert np.all(np.abs(got - w) <= steps * REACH[kind] * (1 + 1e-5))
    assert np.all(got[w == 0] == 0)  # pruned weights stay zero


@pytest.mark.parametrize("kind", sorted(REACH))
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("group", [0, 4])
def test_the_device_reads_what_numpy_reads(kind, axis, group):
    shape = (2, 7, 9)
    fmt = Format(kind, group)
    arrays = fmt.quantise(normal(*shape), axis)
    with jax.set_mesh(mesh_of(tiny_config())):
        got = fmt.dequantise(*map(jnp.asarray, arrays), axis, shape[axis], jnp.float32)
    np.testing.assert_array_equal(got, back(fmt, *arrays, axis, shape[axis]))


def test_two_codes_share_a_byte_the_first_in_its_low_bits():
    w = np.array([[-7.0, 3.0], [2.0, 0.0], [7.0, -1.0]])
    values, scales = Format("int4").quantise(w, -2)
    np.testing.assert_allclose(scales, [[1, 3 / 7]], rtol=1e-6)
    codes = np.array([[1, 15], [10, 8], [15, 6]])  # 8 stands for 0; rounded in their own scales
    np.testing.assert_array_equal(values, [codes[0] | codes[1] << 4, codes[2]])
    turned, _ = Format("int4").quantise(w.T, -1)
    np.testing.assert_array_equal(turned, values.T)


def test_nf4s_levels_are_quantiles_of_the_normal_distribution():
    """As QLoRA's code makes them: 8 of the positive half, 7 of the negative, and 0."""
    from statistics import NormalDist

    offset = 0.9677083
    above = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=1e-6)


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_a_group_has_a_scale_of_its_own(kind):
    w = normal(64, 5).astype(np.float32)
    w[:32] *= 1000
    fmt = Format(kind, 32)
    _, scales = fmt.quantise(w, -2)
    largest = np.abs(w.reshape(2, 32, 5)).max(1)
    np.testing.assert_allclose(
        np.asarray(scales, np.float32), largest / np.abs(LEVELS[kind]).clip(max=7).max(), rtol=8e-3
    )
