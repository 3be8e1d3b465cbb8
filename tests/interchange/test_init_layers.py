"""A model of some of the layers of another one: DistilBERT's start (arXiv:1910.01108)."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxgpt.checkpointing.checkpoints import save_weights
from jaxgpt.config import Config, presets
from jaxgpt.config.stored import to_json
from jaxgpt.config.validate import validate
from jaxgpt.interchange.init_from import check_model, completed
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path
from jaxgpt.training.warm_start import warm_params
from tests.conftest import mesh_of, tiny_config

MIXTURE = dict(num_experts=2, expert_dim=8, first_dense_layers=1)
META = {"tokens": 0, "seconds": 0.0, "data_fingerprint": ""}


def taking(layers: str, folder, **model) -> Config:
    """A run that starts from `layers` of what is at `folder`."""
    config = tiny_config(**MIXTURE | model)
    return dataclasses.replace(config, init_from=str(folder), init_layers=layers)


@pytest.fixture
def five(tmp_path):
    """A workdir of five layers, all but the first mixtures, whose values are all different, and its
    parameters."""
    config = tiny_config(num_layers=5, **MIXTURE)
    with jax.set_mesh(mesh_of(config)):
        shapes = jax.eval_shape(ModelSpec(config, "xla").init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_weights(tmp_path, params, META)
    (tmp_path / "config.json").write_text(to_json(config))
    return tmp_path, leaves_by_path(params)


@pytest.mark.parametrize(("text", "layers"), [("every_second", [0, 2, 4]), ("0, 4", [0, 4])])
def test_the_model_has_the_layers_that_were_named(five, text, layers):
    folder, source = five
    config = taking(text, folder, num_layers=len(layers))
    with jax.set_mesh(mesh_of(config)):
        found = leaves_by_path(warm_params(config, ModelSpec(config, "xla")))
    assert set(found) == set(source)
    for path, leaf in found.items():
        of_mixture = "/router/" in path or "/experts/" in path
        of_dense = path.startswith(("blocks/mlp/up/", "blocks/mlp/down/"))
        rows = [layer - 1 for layer in layers if layer] if of_mixture else layers
        rows = [0] if of_dense else rows
        want = source[path][rows] if path.startswith("blocks/") else source[path]
        rows = slice(config.model.vocab_size if path == "tokens" else None)  # the rest is padding
        np.testing.assert_array_equal(leaf[rows], want[rows])
    config.model, config.data.tokenizer = presets.from_init(), "byte"
    assert completed(config).model.num_layers == len(layers), "a config that leaves it open"


@pytest.mark.parametrize(
    ("layers", "here", "message"),
    [
        ("", dict(num_layers=3), "5 there, 3 here; leave .* or name the layers to take in init_la"),
        ("every_second", dict(num_layers=2), "with init_layers=every_second .*: 3 there, 2 here"),
        ("0,5", dict(num_layers=2), "has 5 layers, numbered from 0 to 4"),
        ("2,1", dict(num_layers=2), "must be every_second, or layers from 0 in ascending order"),
        ("1,1", dict(num_layers=2), "must be every_second"),
        ("half", dict(num_layers=2), "must be every_second"),
    ],
)
def test_what_does_not_fit_is_refused(five, layers, here, message):
    with pytest.raises(BadInput, match=message):
        check_model(validate(taking(layers, five[0], **here)))


def test_layers_keep_their_windows_and_kinds(five):
    pattern = dict(window=4, full_attention_every=2)
    (five[0] / "config.json").write_text(to_json(tiny_config(num_layers=6, **MIXTURE, **pattern)))
    check_model(taking("0,1,4,5", five[0], num_layers=4, **pattern))
    with pytest.raises(BadInput, match="every 2th layer attends to all"):
        check_model(taking("0,2", five[0], num_layers=2, **pattern))
    with pytest.raises(BadInput, match="layers 1, 2, 3, 4, 5 are mixtures; choose layers that"):
        check_model(taking("2,3", five[0], num_layers=2, **pattern))


def test_layers_need_a_model_to_take_them_from():
    with pytest.raises(BadInput, match="init_layers=0,1 needs init_from"):
        validate(dataclasses.replace(tiny_config(), init_layers="0,1"))
