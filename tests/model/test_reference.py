"""Every variant of the model against a forward pass written out in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model import ModelSpec
from jaxgpt.ops.activations import ACTIVATIONS
from jaxgpt.ops.sparse.patterns import patterns_of
from tests.conftest import mesh_of, random_batch, tiny_config
from tests.model.test_gpt import VARIANTS


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    """x times the normal distribution's cumulative, integrated numerically."""
    at = np.linspace(-12, 12, 240_001)
    density = np.exp(-(at**2) / 2) / np.sqrt(2 * np.pi)
    return x * np.interp(x, at, np.cumsum(density) * (at[1] - at[0]))


PLAIN = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-5, 5, 41)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(x)), PLAIN[name](x), atol=2e-4)


def norm64(x, params, cfg):
    if cfg.norm == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * params["scale"]
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + cfg.norm_eps)
    return normed * params["scale"] + params.get("bias", 0.0)


def rope64(x, theta):
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


def attention64(x, p, cfg, window):
    def heads(name):
        found = np.einsum("btd,dnh->btnh", x, p[name]["kernel"]) + p[name].get("bias", 0.0)
        if cfg.qk_norm and name != "value":
            found = norm64(found, p[f"{name}_norm"], cfg)
        return (
            rope64(found, cfg.rope_theta) if cfg.position == "rope" and name != "value" else found
        )

    q, k, v = (heads(name) for name in ("query", "key", "value"))
    group, (length, width) = cfg.num_heads // cfg.num_kv_heads, (x.shape[1], cfg.head_dim)
    k, v = (np.repeat(a, group, axis=2) for a in (k, v))
    # muP: 1/H, made equal to the usual 1/sqrt(H) at the common H of 64
    scale = 8 / width if cfg.mup_base_width else width**-0.5
    scores = scale * np.einsum("btnh,bsnh->bnts", q, k)
    ago = np.arange(length)[:, None] - np.arange(length)
    seen = (ago >= 0) & (ago < window if window else True)
    if pattern := patterns_of(cfg)[1]:  # what it shows: tests/ops/test_sparse.py
        seen &= np.asarray(pattern.visible(np.arange(length)[:, None], np.arange(length)))
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    out = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    return np.einsum("btnh,nhd->btd", out, p["out"]["kernel"]) + p["out"].get("bias", 0.0)


def feed_forward64(x, p, cfg):
    def linear(name, x):
        return x @ p[name]["kernel"] + p[name].get("bias", 0.0)

    gates = {"swiglu": "silu", "geglu": "gelu_tanh"}
    if cfg.activation in gates:
        return linear("down", PLAIN[gates[cfg.activation]](linear("gate", x)) * linear("up", x))
    return linear("down", PLAIN[cfg.activation](linear("up", x)))


def forward64(params, cfg, tokens):
    x = params["tokens"][tokens] * (cfg.embed_dim**0.5 if cfg.scale_embeddings else 1)
    if cfg.position == "learned":
        x = x + params["positions"]["kernel"][: tokens.shape[1]]
    if cfg.position == "sinusoidal":
        at, i = np.arange(tokens.shape[1])[:, None], np.arange(cfg.embed_dim)
        angles = at / 10_000 ** (2 * (i // 2) / cfg.embed_dim)
        x = x + np.where(i % 2, np.cos(angles), np.sin(angles))
    for l in range(cfg.num_layers):
        p = jax.tree.map(lambda a, l=l: a[l], params["blocks"])
        every = cfg.full_attention_every
        window = 0 if every and (l + 1) % every == 0 else cfg.window
        for name, layer in (
            ("attention", lambda x, p=p, w=window: attention64(x, p["attention"], cfg, w)),
            ("mlp", lambda x, p=p: feed_forward64(x, p["mlp"], cfg)),
        ):
            scale = p[f"{name}_norm"]
            if cfg.norm_position == "pre":
                x = x + layer(norm64(x, scale, cfg))
            else:
                x = norm64(x + layer(x), scale, cfg)
    if cfg.norm_position == "pre":
        x = norm64(x, params["final_norm"], cfg)
    logits = x @ params["tokens" if cfg.tie_embeddings else "head"][: cfg.vocab_size].T
    logits = logits * (cfg.mup_base_width / cfg.embed_dim if cfg.mup_base_width else 1)
    cap = cfg.logit_softcap
    return cap * np.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "lsh"])  # hashed: tests/ops
def test_logits_against_float64(variant):
    """Parameters far from their init, so that biases, scales and caps all show."""
    config = tiny_config(**VARIANTS[variant])
    tokens = random_batch(config)["inputs"][0]
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        rng, abstract = np.random.default_rng(0), jax.eval_shape(spec.init, jax.random.key(0))
        params = jax.tree.map(lambda leaf: rng.normal(0.2, 0.3, leaf.shape), abstract)
        floats = jax.tree.map(jnp.float32, params)
        found = jax.jit(lambda p: spec.bind(p)(jnp.asarray(tokens)))(floats)[
            ..., : config.model.vocab_size
        ]
    want = forward64(params, spec.model, tokens)
    assert np.abs(want).max() > 2, "logits must reach into the softcap"
    np.testing.assert_allclose(found, want, atol=2e-4 * np.abs(want).max())
