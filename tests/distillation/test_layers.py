"""Hidden states inside both models: which are compared, and what they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.distillation.layers import comparison, cut, layer_pairs
from jaxgpt.model import ModelSpec
from jaxgpt.model.stacked.blocks import Part
from jaxgpt.shrinking.structure import without_layers
from jaxgpt.system.errors import BadInput
from tests.conftest import mesh_of, random_batch, tiny_config


def test_pairs():
    assert layer_pairs("uniform", 2, 4) == [(0, 1), (1, 3)]
    assert layer_pairs("uniform", 2, 3) == [(0, 0), (1, 2)]
    assert layer_pairs("uniform", 3, 1) == [(0, 0), (1, 0), (2, 0)]
    assert layer_pairs("0:3,1:0", 2, 4) == [(0, 3), (1, 0)] and layer_pairs("", 2, 4) == []
    for text in ("2:0", "0:4"):
        with pytest.raises(BadInput, match="student's are 0 to 1, the teacher's 0 to 3"):
            layer_pairs(text, 2, 4)


def test_parts_end_where_they_are_cut_and_keep_their_pattern():
    kinds, parts = ("a", "b") * 3, (Part(0, 6, 2),)
    assert cut(parts, kinds, [3]) == (Part(0, 4, 2), Part(4, 6, 2))
    assert cut(parts, kinds, [0, 5]) == (Part(0, 1, 1), Part(1, 6, 5))
    assert cut((Part(0, 1, 1), Part(1, 6, 5)), kinds, []) == (Part(0, 1, 1), Part(1, 6, 5))


def test_the_distance_is_that_of_numpy_between_models_that_end_there():
    """A state is what the same model without the later layers gives its last norm; on a mesh."""
    config = tiny_config((2, 2, 2), num_layers=4, window=5, full_attention_every=2)
    config.compute.dtype = "float32"
    tokens = jnp.asarray(random_batch(config)["inputs"][0])
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        params = jax.tree.map(lambda a: 4 * a, jax.jit(spec.init)(jax.random.key(0)))
        kernels = np.float32(rng.normal(size=(2, 32, 32)))

        @jax.jit
        def compared(params, kernels):
            student, teacher = spec.bind(params), spec.bind(jax.tree.map(lambda a: 0.7 * a, params))
            compare = comparison("0:1,1:0", student, teacher)
            last, theirs = (model.hidden(tokens)[0] for model in (student, teacher))
            plain = comparison("", student, teacher)(last, theirs, kernels[0])
            return compare(last, theirs, kernels), plain, (last, theirs)

        found, plain, last = jax.device_get(compared(params, kernels))
        host, states = jax.device_get(params), {}
        for layers in (1, 2):
            own, model = without_layers(host, config.model, np.arange(layers))
            ends = ModelSpec(dataclasses.replace(config, model=model), "xla")

            @jax.jit
            def state(params, ends=ends):
                model = ends.bind(params)
                model.stack.final_norm = jnp.asarray
                return model.hidden(tokens)[0]

            for factor in (1, 0.7):
                x = np.asarray(state(jax.tree.map(lambda a, f=factor: np.float32(f * a), own)))
                states[factor, layers] = x / np.sqrt(np.mean(x**2, -1, keepdims=True))
    pairs = (states[1, 1], states[0.7, 2], kernels[0]), (states[1, 2], states[0.7, 1], kernels[1])
    want = np.mean([np.mean((x @ k - y) ** 2, -1) for x, y, k in pairs], axis=0)
    np.testing.assert_allclose(found, want, rtol=2e-3)
    np.testing.assert_allclose(plain, np.mean((last[0] @ kernels[0] - last[1]) ** 2, -1), rtol=1e-4)
