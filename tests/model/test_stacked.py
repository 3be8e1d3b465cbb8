"""Layers that are not all alike: mixtures between dense layers, behind windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import Config, MeshConfig
from jaxgpt.config.schema import ModelConfig
from jaxgpt.model import ModelSpec, decoding
from jaxgpt.model.stacked.blocks import Part, layer_kinds, parts_of
from jaxgpt.optim.optimizers import make_optimizer
from jaxgpt.parameters.flops import count_active, count_parameters, flops_per_token
from tests.conftest import mesh_of, random_batch, tiny_config
from tests.training.test_sharding import assert_same, ten_steps

FIELDS = dict(num_layers=6, num_experts=4, expert_dim=12, expert_every=2, first_dense_layers=2)
FIELDS |= dict(window=3, full_attention_every=2, position="none", bias=False, norm="layernorm")


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_by_layer(params: dict, tokens: np.ndarray) -> np.ndarray:
    """The logits in float64, from each layer's own arrays: of six the second and the fourth and the
    sixth see all, the fourth and the sixth are mixtures."""
    at = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    blocks, length = at["blocks"], tokens.shape[1]

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def feed_forward(mlp, x, row):
        return gelu(x @ mlp["up"]["kernel"][row]) @ mlp["down"]["kernel"][row]

    def mixture(mlp, x, row):
        shares, y = softmax(x @ mlp["router"]["kernel"][row]), np.zeros_like(x)
        best = np.sort(shares, -1)[..., -2:-1]
        chosen = np.where(shares >= best, shares, 0)
        for e in range(4):
            kernels = {n: {"kernel": k["kernel"][row]} for n, k in mlp["experts"].items()}
            y += chosen[..., e : e + 1] * feed_forward(kernels, x, e)
        return y / chosen.sum(-1, keepdims=True)

    x = at["tokens"][tokens]
    apart = np.arange(length)[:, None] - np.arange(length)
    for i, row in enumerate([0, 1, 2, 0, 3, 1]):
        kernels = {n: k["kernel"][i] for n, k in blocks["attention"].items()}
        y = norm(x, blocks["attention_norm"]["scale"][i])
        q, k, v = (np.einsum("BTD,DNH->BNTH", y, kernels[n]) for n in ("query", "key", "value"))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        seen = (apart >= 0) & (apart < (3 if i % 2 == 0 else length))
        y = np.einsum("BNTH,NHD->BTD", softmax(np.where(seen, scores, -1e30)) @ v, kernels["out"])
        x = x + y
        y = norm(x, blocks["mlp_norm"]["scale"][i])
        x = x + (mixture if i in (3, 5) else feed_forward)(blocks["mlp"], y, row)
    return norm(x, at["final_norm"]["scale"]) @ at["tokens"].T


def large(params: dict) -> dict:
    """Weights of which every layer's part of the result shows."""
    return jax.tree.map(lambda a: 5 * a if a.ndim > 2 else a, params)


@pytest.fixture(scope="module")
def built() -> tuple[ModelSpec, dict]:
    config = tiny_config(**FIELDS)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        return spec, large(jax.jit(spec.init)(jax.random.key(0)))


def test_the_logits_are_those_of_the_layers_one_by_one(built):
    """Also of a program that decodes, which has each layer's arrays apart."""
    spec, params = built
    tokens = random_batch(spec.config)["inputs"][0, :2]
    wanted = layer_by_layer(jax.device_get(params), tokens)
    with jax.set_mesh(mesh_of(spec.config)):
        model = spec.bind(params)
        logits = jax.jit(lambda p, t: spec.bind(p)(t))(params, jnp.asarray(tokens))
        read = decoding.split_layers(params, spec.model)["blocks"]
        places = jnp.broadcast_to(jnp.arange(24), (2, 24))
        start = jax.jit(lambda read, t, at: decoding.prefill(model, read, t, at)[0])
        last = start(read, jnp.asarray(tokens), places)[:, -1]
        last = decoding.next_logits(model, last, model.vocabulary.table())
    size, scale = spec.model.vocab_size, np.abs(wanted).max()
    np.testing.assert_allclose(logits[..., :size], wanted[..., :size], atol=1e-5 * scale)
    np.testing.assert_allclose(last[:, :size], wanted[:, -1, :size], atol=1e-5 * scale)


def test_each_array_has_its_own_layers(built):
    spec, params = built
    mlp = params["blocks"]["mlp"]
    assert params["blocks"]["attention"]["query"]["kernel"].shape[0] == 6
    assert mlp["up"]["kernel"].shape == (4, 32, 128) and set(mlp) == {"up", "down", "router"} | {
        "experts"
    }
    assert mlp["experts"]["up"]["kernel"].shape == (2, 4, 32, 12)
    one_expert = 2 * 32 * 12
    parameters = count_parameters(params, spec.model)
    assert count_active(params, spec.model) == parameters - 2 * 2 * one_expert
    # attention's four matrices; two experts and a router, or a dense layer
    layers = 6 * 4 * 32 * 32 + 2 * (2 * one_expert + 4 * 32) + 4 * 2 * 32 * 128
    wanted = 6 * (layers + 203 * 32) + 12 * 6 * 32 * 24
    assert flops_per_token(spec.model) == wanted


def test_the_parts_of_a_stack():
    def parts(**fields):
        cfg = ModelConfig(**fields)
        return list(parts_of(layer_kinds(cfg), cfg.first_dense_layers))

    def mixtures(**fields):
        return list(ModelConfig(**fields).mixture_layers)

    assert parts(num_layers=6) == [Part(0, 6, 1)]
    assert parts(num_layers=6, window=2, full_attention_every=3) == [Part(0, 6, 3)]
    assert parts(num_layers=27, num_experts=4, first_dense_layers=1) == [
        Part(0, 1, 1),
        Part(1, 27, 1),
    ]
    both = dict(num_layers=12, num_experts=4, expert_every=2, window=2, full_attention_every=3)
    assert parts(**both) == [Part(0, 12, 6)]
    assert mixtures(num_layers=4, num_experts=2, expert_every=2) == [1, 3]
    assert mixtures(num_layers=4, num_experts=2, first_dense_layers=3) == [3]
    assert mixtures(num_layers=4) == []


def test_adafactor_takes_each_experts_matrix_apart(built):
    """Its clipping, by a matrix's own RMS, sees neither other layers nor other experts."""
    spec, params = built
    config = tiny_config()
    config.optim.name, config.optim.clip_norm = "adafactor", 0
    optimizer = make_optimizer(config.optim, 10, spec.model)

    def update(grads, params):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    def draw(a):
        return jax.device_put(rng.normal(size=a.shape).astype(np.float32), a.sharding)

    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh_of(config)):
        grads = jax.tree.map(draw, params)
        updates = jax.jit(update)(grads, jax.tree.map(jnp.zeros_like, params))
    up, of_dense = (updates["blocks"]["mlp"][n] for n in ("experts", "up"))
    rms = np.sqrt(np.mean(np.square(up["up"]["kernel"]), axis=(2, 3)))
    rate = np.sqrt(np.mean(np.square(of_dense["kernel"]), axis=(1, 2)))[0]
    np.testing.assert_allclose(rms, rate, rtol=1e-5)


@pytest.mark.slow
def test_ten_steps_on_a_mesh_unrolled_equal_one_device_in_scans():
    """With Muon, which orthogonalises matrices of all stacks."""

    def config(compute: dict, *mesh: int) -> Config:
        config = tiny_config(**FIELDS | {"num_layers": 4}, dropout=0.1, compute=compute)
        config.optim.name, config.mesh = "muon", MeshConfig(*mesh)
        return config

    alone = ten_steps(config({"remat": "full"}, 1, 1, 1))
    assert_same(ten_steps(config({"scan_layers": "false"}, 1, 2, 1, 2)), alone)
