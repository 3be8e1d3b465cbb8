"""Mixtral and Qwen3-MoE, read from folders, compute what transformers' models do.

Against committed golden files everywhere; live against torch with `-m parity`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import shrink, train
from jaxgpt.checkpointing.checkpoints import concrete
from jaxgpt.config import Config, ModelConfig
from jaxgpt.interchange.families import family_of
from jaxgpt.interchange.families.mixtures import QWEN3_MOE
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.load import put_like
from jaxgpt.interchange.weights import read_params
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from tests.conftest import config_flag, mesh_of, tiny_config
from tests.golden import mixtures_torch
from tests.interchange.test_hf_parity import our_logits
from tests.interchange.test_import_export import LLAMA, model_folder, run_export, run_import
from tests.interchange.test_more_families import arrays_of, write_folder
from tests.model.test_gpt2_parity import assert_gradients_agree, named

FAMILIES = list(mixtures_torch.CONFIGS)
SOURCES = ["golden", pytest.param("live", marks=pytest.mark.parity)]
MIXTRAL = LLAMA | dict(num_experts=4, expert_dim=12, bias=False)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("source", SOURCES)
def test_logits_loss_and_gradients(tmp_path, name, source):
    """Qwen3's with the balance loss in it: of one mixture, as theirs takes the shares of all layers
    together before it multiplies them."""
    if source == "golden":
        found = dict(np.load(mixtures_torch.FOLDER / f"{name}.npz"))
    else:
        found = mixtures_torch.reference(name, 1)
    tokens = jnp.asarray(found["tokens"])
    write_folder(tmp_path, json.loads(str(found["config"])), named(found, "weight/"))
    opened = open_folder(tmp_path)
    spec = ModelSpec(Config(model=opened.model), "xla")

    def loss_of(params):
        vocabulary = (model := spec.bind(params)).vocabulary
        x, figures = model.hidden(tokens[:, :-1])
        loss = jnp.mean(vocabulary.losses(x, tokens[:, 1:])[0])
        logits = vocabulary.logits(x, vocabulary.table())
        return loss + figures["auxiliary_loss"], (loss, logits, figures)

    with jax.set_mesh(mesh_of(tiny_config())):
        abstract = concrete(jax.eval_shape(spec.init, jax.random.key(0)))
        params = jax.tree.map(put_like, read_params(opened, abstract), abstract)
        run = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
        (_, (loss, logits, figures)), grads = run(params)
        expected = arrays_of(tmp_path, named(found, "grad/"), spec)
    ours = np.asarray(logits)[..., : opened.model.vocab_size]
    np.testing.assert_allclose(ours, found["logits"], atol=1e-4, rtol=0)
    assert abs(float(loss) - found["loss"]) < 1e-5
    if name == "qwen3_moe":
        assert float(figures["balance_loss"]) == pytest.approx(found["balance_loss"], rel=1e-5)
        assert opened.model.balance_loss == 0.05
    assert_gradients_agree(grads, expected)


QWEN3 = json.loads(str(np.load(mixtures_torch.FOLDER / "qwen3_moe.npz")["config"]))
QWEN3 |= dict(num_hidden_layers=4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (dict(mlp_only_layers=[0, 2]), "mlp_only_layers=[0, 2] with decoder_sparse_step=1 is not"),
        (dict(mlp_only_layers=[0, 1, 2, 3]), "mlp_only_layers=[0, 1, 2, 3] with"),
        (
            dict(num_local_experts=60_000, num_experts_per_tok=1),
            "4 layers of 60000 experts, its files",
        ),
        (dict(model_type="mixtral", sliding_window=4), "sliding_window=4 is not supported"),
        (
            dict(model_type="deepseek_v2"),
            "not supported: jaxgpt has no multi-head latent attention",
        ),
    ],
)
def test_folders_that_are_not_ours(tmp_path, edit, message):
    config = QWEN3 | dict(decoder_sparse_step=1, mlp_only_layers=[]) | edit
    arrays = {f"a.{i}": np.zeros((300, 1), np.float32) for i in range(40)}
    write_folder(tmp_path, config, arrays)
    with pytest.raises(BadInput) as e:
        open_folder(tmp_path)
    assert message in str(e.value)


@pytest.mark.parametrize("dense", [[], [0], [0, 1]])
def test_which_layers_are_dense(dense):
    """Also where the folder names layers that the step leaves dense anyway."""
    every = QWEN3 | dict(mlp_only_layers=dense, decoder_sparse_step=2)
    cfg = QWEN3_MOE.model_config(every)
    mixtures = [i for i in range(4) if i not in dense and i % 2]
    assert list(cfg.mixture_layers) == mixtures
    alone = QWEN3_MOE.model_config(QWEN3 | dict(mlp_only_layers=dense, decoder_sparse_step=1))
    assert list(alone.mixture_layers) == [i for i in range(4) if i not in dense]


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        (dict(router="sigmoid_topk"), "model.router='sigmoid_topk'"),
        (dict(shared_experts=1), "model.shared_experts=1"),
        (dict(expert_every=2), "model.expert_every=2"),
        (dict(expert_capacity=1.5), "model.expert_capacity=1.5"),
    ],
)
def test_mixtures_that_have_no_counterpart(fields, difference):
    with pytest.raises(BadInput, match="the nearest, mixtral, does not support") as e:
        family_of(ModelConfig(**MIXTRAL | fields).with_sizes())
    assert difference in str(e.value)


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_folders_of_transformers_and_back(command, tmp_path, corpus, name):
    """Split over files as theirs are; and what two steps of a run of ours made is read there."""
    import torch
    from transformers import AutoModelForCausalLM

    def theirs(model, tokens):
        with torch.no_grad():
            return model.eval()(torch.tensor(tokens).long()).logits.numpy()

    model = mixtures_torch.make_model(name, 1)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    tokens = np.random.default_rng(0).integers(0, 131, (2, 30)).astype(np.int32)
    np.testing.assert_allclose(
        our_logits(tmp_path / "hf", tokens), theirs(model, tokens), atol=1e-4
    )
    fields = dict(num_layers=2, num_heads=4, embed_dim=32, max_seq_len=24) | MIXTRAL
    if name == "mixtral":
        model_folder(tmp_path / "out", **fields)
    else:
        fields |= dict(qk_norm=True, expert_every=2, normalize_gates=False)
        data = f"DataConfig('text:{corpus}/*')"
        flag = config_flag(tmp_path, f"num_steps=2, model=ModelConfig(**{fields}), data={data}")
        code, _, err = command(train.main, flag, f"--workdir={tmp_path}/w")
        assert code == 0, err
        run_export(command, tmp_path / "w", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == mixtures_torch.CONFIGS[name][0]
    found = our_logits(tmp_path / "out", tokens)
    np.testing.assert_allclose(found, theirs(again, tokens), atol=1e-4)


def test_a_mixture_is_not_shrunk(command, tmp_path):
    model_folder(tmp_path / "hf", **MIXTRAL)
    run_import(command, tmp_path / "hf", tmp_path / "w")
    flags = f"--workdir={tmp_path}/w", f"--out={tmp_path}/s", "--method=int8", "--data=builtin"
    code, _, err = command(shrink.main, *flags)
    assert code == 2 and "holds a mixture (model.num_experts=4): shrink knows dense models" in err
    assert not (tmp_path / "s").exists()
