"""A mixture that starts from a dense model computes what that does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import Config, DataConfig, MeshConfig, presets
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.init_from import completed
from jaxgpt.interchange.weights import read_params
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from jaxgpt.training.warm_start import warm_params
from tests.conftest import mesh_of, tiny_config
from tests.interchange.test_import_export import LLAMA, model_folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder of four layers, a row of tokens, and its logits."""
    folder = tmp_path_factory.mktemp("dense") / "hf"
    cfg, _ = model_folder(folder, **LLAMA, num_layers=4)
    opened, spec = open_folder(folder), ModelSpec(Config(model=cfg), "xla")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (4, 20))
    with jax.set_mesh(mesh_of(tiny_config())):
        params = read_params(opened, jax.eval_shape(spec.init, jax.random.key(0)))
        return folder, tokens, np.asarray(jax.jit(lambda p, t: spec.bind(p)(t))(params, tokens))


def from_dense(folder, mesh=(1, 1, 1, 1), **fields) -> Config:
    config = Config(init_from=str(folder), model=presets.from_init(**fields))
    config.data, config.mesh = DataConfig(tokenizer=""), MeshConfig(*mesh)
    return completed(config)


CASES = {
    "all": (dict(num_experts=4), (1, 1, 1, 2), range(4)),
    "some": (
        dict(num_experts=6, experts_per_token=3, expert_every=2, router="sigmoid_topk"),
        (1, 1, 1, 1),
        [1, 3],
    ),
}


@pytest.mark.parametrize("case", [pytest.param("all", marks=pytest.mark.slow), "some"])
def test_its_logits_are_those_of_the_dense_model(dense, capsys, case):
    folder, tokens, wanted = dense
    fields, mesh, mixtures = CASES[case]
    config = from_dense(folder, mesh, **fields)
    assert list(config.model.mixture_layers) == list(mixtures)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        params = warm_params(config, spec)
        logits = np.asarray(jax.jit(lambda p, t: spec.bind(p)(t))(params, jnp.asarray(tokens)))
    experts = params["blocks"]["mlp"]["experts"]["up"]["kernel"]
    assert experts.shape[:2] == (len(mixtures), config.model.num_experts)
    finite = np.isfinite(wanted)
    scale = np.abs(wanted[finite]).max()
    np.testing.assert_allclose(logits[finite], wanted[finite], atol=1e-5 * scale)
    line = (
        f"{len(mixtures)} of 4 layers: each of {config.model.num_experts} experts starts as a copy"
    )
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(expert_dim=64), "model.expert_dim=64 must be 128, so that experts"),
        (dict(shared_experts=1), "model.shared_experts=1 must be 0"),
        (dict(normalize_gates=False), "model.normalize_gates=False must be True"),
        (dict(num_layers=5), "is another model: model.num_layers: 4 there, 5 here"),
    ],
)
def test_a_mixture_that_would_start_otherwise_is_refused(dense, fields, message):
    with pytest.raises(BadInput) as e:
        from_dense(dense[0], num_experts=4, **fields)
    assert message in str(e.value)


def test_biases_and_another_number_of_experts_are_refused(tmp_path):
    model_folder(tmp_path / "gpt2", activation="gelu")
    with pytest.raises(BadInput, match="its feed-forward has biases"):
        from_dense(tmp_path / "gpt2", num_experts=4)
    model_folder(tmp_path / "mixture", **LLAMA, num_experts=4)
    with pytest.raises(BadInput, match="model.num_experts: 4 there, 8 here"):
        from_dense(tmp_path / "mixture", num_experts=8)
