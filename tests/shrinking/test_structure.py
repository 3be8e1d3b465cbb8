"""Heads, columns and layers: importance against finite differences, removal against weights that
are zero."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import make_eval_step
from jaxgpt.shrinking.quantise import projections, with_kernels
from jaxgpt.shrinking.structure import (
    all_heads,
    check_heads_alone,
    gate_importance,
    most_important,
    with_silent_heads,
    without_heads_and_columns,
    without_layers,
)
from jaxgpt.system.errors import BadInput
from tests.conftest import mesh_of, random_batch, tiny_config

GROUPED = dict(num_kv_heads=2, position="rope", activation="swiglu", qk_norm=True)


def random_params(spec, scale: float = 3.0) -> dict:
    """Weights and biases large enough that every part matters."""
    params, rng = jax.jit(spec.init)(jax.random.key(0)), np.random.default_rng(0)
    return jax.tree.map(lambda a: scale * np.asarray(a) + 0.1 * rng.normal(size=a.shape), params)


def logits(config, params, tokens):
    spec = ModelSpec(config, "xla")
    params = jax.tree.map(np.float32, params)
    return np.asarray(jax.jit(lambda p, t: spec.bind(p)(t))(params, tokens))[..., :203]


def scaled(params: dict, owner: str, index: tuple, factor: float) -> dict:
    """The parameters with these rows of a stacked kernel multiplied."""
    kernel = dict(projections(params["blocks"]))[owner].copy()
    kernel[index] *= factor
    return with_kernels(params, {owner: kernel})


def test_importance_is_the_slope_of_each_window_s_loss():
    config = tiny_config(**GROUPED)
    tokens = random_batch(config)
    windows = [{k: a[0][i : i + 1] for k, a in tokens.items()} for i in range(3)]
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        params = jax.tree.map(np.float32, random_params(spec, 2.0))
        heads, columns = gate_importance(spec, params, windows)
        measure = make_eval_step(spec.for_decoding())

        def slope(owner, index):
            def nats(factor):
                moved = scaled(params, owner, index, factor)
                rows = [measure(moved, {k: a[None] for k, a in w.items()}) for w in windows]
                return np.array([np.asarray(row, np.float64).sum() for row in rows])

            return np.mean(np.abs(nats(1.02) - nats(0.98)) / 0.04)

        for layer, group in ((0, 0), (1, 1)):
            index = (layer, slice(2 * group, 2 * group + 2))
            assert heads[layer, group] == pytest.approx(slope("out", index), rel=0.02)
        for layer, column in ((0, 5), (1, 77)):
            found = slope("down", (layer, column))
            assert columns[layer, column] == pytest.approx(found, rel=0.05, abs=2e-3)
    assert heads.shape == (2, 2) and columns.shape == (2, 128)


@pytest.mark.parametrize("fields", [{}, GROUPED])
def test_a_model_without_heads_and_columns_is_one_whose_heads_and_columns_add_nothing(fields):
    config = tiny_config(**fields)
    rng, cfg = np.random.default_rng(3), config.model
    groups = most_important(rng.random((2, cfg.num_kv_heads)), 0.5)
    columns = most_important(rng.random((2, 128)), 0.25)
    tokens = random_batch(config)["inputs"][0]
    with jax.set_mesh(mesh_of(config)):
        params = random_params(ModelSpec(config, "xla"))
        smaller, model = without_heads_and_columns(params, cfg, groups, columns)
        silenced = params
        for layer in range(2):
            gone = sorted(set(range(cfg.num_kv_heads)) - set(groups[layer].tolist()))
            per_group = cfg.num_heads // cfg.num_kv_heads
            heads = [per_group * g + i for g in gone for i in range(per_group)]
            silenced = scaled(silenced, "out", (layer, heads), 0)
            gone = sorted(set(range(128)) - set(columns[layer].tolist()))
            silenced = scaled(silenced, "down", (layer, gone), 0)
        found = logits(dataclasses.replace(config, model=model), smaller, tokens)
        np.testing.assert_allclose(found, logits(config, silenced, tokens), rtol=1e-4, atol=1e-4)
        assert not np.allclose(found, logits(config, params, tokens), atol=0.1)
        full = all_heads(model)  # as some architectures want it; grouped heads stay as they are
        filled = with_silent_heads(smaller, full.num_heads) if full != model else smaller
        again = logits(dataclasses.replace(config, model=full), filled, tokens)
        np.testing.assert_allclose(again, found, rtol=1e-4, atol=1e-4)
    assert (model.num_heads, model.num_kv_heads) == (2, cfg.num_kv_heads // 2)
    assert full.num_heads == (2 if fields else 4)
    assert (model.mlp_dim, model.head_dim, model.embed_dim) == (96, 8, 32)
    assert smaller["blocks"]["mlp"]["up"]["kernel"].shape == (2, 32, 96)


def test_the_least_important_go_and_the_others_keep_their_order():
    importance = np.array([[5.0, 1, 4, 2], [1, 2, 3, 4]])
    np.testing.assert_array_equal(most_important(importance, 0.25), [[0, 2, 3], [1, 2, 3]])
    np.testing.assert_array_equal(most_important(importance, 0.5), [[0, 2], [2, 3]])


def test_heads_that_share_a_table_over_the_layers_stay():
    with pytest.raises(BadInput, match="heads cannot be removed with model.position=relative"):
        check_heads_alone(tiny_config(position="relative").model)


def test_a_model_without_layers_is_one_whose_layers_add_nothing():
    config = tiny_config(num_layers=3, bias=False)
    tokens = random_batch(config)["inputs"][0]
    with jax.set_mesh(mesh_of(config)):
        params = random_params(ModelSpec(config, "xla"))
        smaller, model = without_layers(params, config.model, np.array([0, 2]))
        silenced = scaled(scaled(params, "out", (1,), 0), "down", (1,), 0)
        found = logits(dataclasses.replace(config, model=model), smaller, tokens)
        np.testing.assert_allclose(found, logits(config, silenced, tokens), rtol=1e-4, atol=1e-4)
    assert model.num_layers == 2
