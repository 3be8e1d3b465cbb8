"""The modern decoder is transformers' Llama, and with qk-norm its Qwen3.

Against committed golden files everywhere; live against torch with `-m parity`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import Config, ModelConfig
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import token_losses
from tests.conftest import mesh_of, tiny_config
from tests.golden import llama_torch as torch_side
from tests.model.test_gpt2_parity import assert_gradients_agree, named


def model_config(name: str) -> ModelConfig:
    shape = torch_side.SHAPE
    scaled = dict(rope_scaling="llama3", rope_factor=8.0, rope_original_len=16)
    if name == "yarn":
        scaled |= dict(rope_scaling=name, rope_factor=4.0, rope_beta_fast=4.0, rope_beta_slow=0.5)
    return ModelConfig(
        vocab_size=shape["vocab_size"],
        max_seq_len=shape["max_position_embeddings"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
        embed_dim=shape["hidden_size"],
        mlp_dim=shape["intermediate_size"],
        norm="rmsnorm",
        norm_eps=shape["rms_norm_eps"],
        position="rope",
        rope_theta=torch_side.THETA,
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
        qk_norm=name == "qwen3",
        **({} if name == "qwen3" else scaled),
    )


LIVE = pytest.mark.parity


@pytest.mark.parametrize(
    ("name", "source"),
    [("llama", "golden"), ("qwen3", "golden")]
    + [pytest.param(name, "live", marks=LIVE) for name in ("llama", "qwen3", "yarn")],
)
def test_logits_loss_and_gradients(name, source):
    if source == "golden":
        found = dict(np.load(torch_side.FOLDER / f"{name}.npz"))
    else:
        found = torch_side.reference(name, 1)
    cfg, tokens = model_config(name), jnp.asarray(found["tokens"])
    spec = ModelSpec(Config(model=cfg), "xla")

    def loss_of(params):
        model, micro = spec.bind(params), {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        return jnp.mean(token_losses(model, micro, None)[0]), model(tokens[:, :-1])

    def ours(prefix: str) -> dict:
        return torch_side.our_layout(named(found, prefix), cfg.padded_vocab_size)

    with jax.set_mesh(mesh_of(tiny_config())):
        fresh = jax.eval_shape(spec.init, jax.random.key(0))
        params = jax.tree.map(jnp.asarray, ours("weight/"))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
        (loss, logits), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    np.testing.assert_allclose(logits[..., : cfg.vocab_size], found["logits"], atol=1e-4, rtol=0)
    assert abs(float(loss) - found["loss"]) < 1e-5
    assert_gradients_agree(grads, ours("grad/"))
