"""Truncated SVD: its error is what was cut off, and two factors compute what the matrix does."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.checkpointing.checkpoints import concrete
from jaxgpt.config import ShrinkConfig
from jaxgpt.config.validate import parse_ranks
from jaxgpt.model import ModelSpec
from jaxgpt.optim.groups import as_matrices, decay_mask, inputs_outputs
from jaxgpt.shrinking.low_rank import decompose, factorised, largest_rank, root_of
from jaxgpt.shrinking.quantise import as_matrix, projections, with_kernels
from jaxgpt.system.errors import BadInput
from tests.conftest import mesh_of, random_batch, tiny_config


def test_the_error_is_what_was_cut_off():
    """Eckart and Young, in the weights and in the outputs; and in the outputs no other matrix of
    the rank is nearer, least of all the best one in the weights."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(24, 16))
    x = rng.normal(size=(500, 24)) * np.geomspace(1, 100, 24)
    x[:, 5] = x[:, 4]  # moments without an inverse
    plain, aware = decompose(w), decompose(w, x.T @ x)
    errors = []
    for rank in (1, 4, 10, 16):
        (a, b), (c, d) = plain.factors(rank), aware.factors(rank)
        assert a.shape == c.shape == (24, rank) and b.shape == d.shape == (rank, 16)
        tail = np.sqrt(np.sum(plain.s[rank:] ** 2))
        assert np.linalg.norm(w - a @ b) == pytest.approx(tail, abs=1e-9)
        errors.append(np.linalg.norm(x @ (w - c @ d)))
        tail = np.sqrt(np.sum(aware.s[rank:] ** 2))
        assert errors[-1] == pytest.approx(tail, rel=1e-3, abs=1e-6)
        assert errors[-1] <= np.linalg.norm(x @ (w - a @ b)) + 1e-6
    assert errors == sorted(errors, reverse=True)


def test_moments_without_a_root_get_a_larger_ridge():
    moments = np.diag([3e6, 1.0, -10.0])  # a sum in float32: off by 1e-7 of the largest
    root = root_of(moments)
    np.testing.assert_allclose(root @ root.T - moments, 100 * np.eye(3), rtol=1e-3, atol=1e-6)
    with pytest.raises(BadInput, match="are not finite numbers"):
        root_of(moments * np.nan)


def test_ranks():
    d = decompose(np.diag([4.0, 3.0, 0.0, 0.0]))
    assert [d.rank_of_energy(e) for e in (0.5, 0.64, 0.65, 0.999)] == [1, 1, 2, 2]
    for inputs, outputs in ((32, 32), (32, 128), (7, 5), (1, 9)):
        rank = largest_rank(inputs, outputs)
        assert rank * (inputs + outputs) < inputs * outputs <= (rank + 1) * (inputs + outputs)
    assert parse_ranks("query=3,down=40") == {"query": 3, "down": 40} and parse_ranks("") == {}
    for text in ("query=0", "query", "head=3", "query=3;up=2", "up=-1"):
        with pytest.raises(BadInput, match="is not PROJECTION=RANK"):
            parse_ranks(text)


def full_rank(config, params):
    """The config and parameters with every projection as two factors of its full rank."""
    made, ranks = {}, []
    for owner, kernels in projections(params["blocks"]):
        layers = [decompose(matrix) for matrix in as_matrix(owner, kernels)[0]]
        rank = len(layers[0].s)
        made[owner] = factorised(owner, kernels, layers, rank)
        ranks.append(f"{owner}={rank}")
    shrink = ShrinkConfig(ranks=",".join(ranks))
    return dataclasses.replace(config, shrink=shrink), with_kernels(params, made)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_full_rank_gives_the_same_logits_and_gradients(shape):
    """Of W = A B the gradients are dA = dW B^T and dB = A^T dW."""
    config = tiny_config(shape, num_kv_heads=2, activation="swiglu", position="rope")
    tokens = jnp.asarray(random_batch(config)["inputs"][0])
    pull = np.random.default_rng(0).normal(size=(8, 24, 203)).astype(np.float32)
    with jax.set_mesh(mesh_of(config)):
        params = jax.jit(ModelSpec(config, "xla").init)(jax.random.key(0))
        params = jax.tree.map(np.asarray, params)
        params = with_kernels(params, {p: 4 * k for p, k in projections(params["blocks"])})
        found = []
        for cfg, values in ((config, params), full_rank(config, params)):
            spec = ModelSpec(cfg, "xla")

            def pulled(p, spec=spec):
                logits = jax.sharding.reshard(spec.bind(p)(tokens), jax.P(None, None, None))
                return jnp.sum(logits[..., :203] * pull), logits

            abstract = concrete(jax.eval_shape(spec.init, jax.random.key(0)))
            values = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), values, abstract)
            grads, logits = jax.jit(jax.grad(pulled, has_aux=True))(values)
            found.append(jax.tree.map(np.asarray, (values, grads, logits[..., :203])))
    (_, dense, want), (factors, grads, logits) = found
    np.testing.assert_allclose(logits, want, atol=1e-5)
    assert np.std(want) > 0.1
    for owner, kernels in projections(dense["blocks"]):
        part = "mlp" if owner in dense["blocks"]["mlp"] else "attention"
        w, _ = as_matrix(owner, kernels)
        (a, b), (da, db) = (
            (k["factor_in"].reshape(*w.shape[:2], -1), k["factor_out"].reshape(2, -1, w.shape[2]))
            for k in (t["blocks"][part][owner]["kernel"] for t in (factors, grads))
        )
        np.testing.assert_allclose(da, w @ b.swapaxes(1, 2), atol=1e-3 * np.abs(da).max())
        np.testing.assert_allclose(db, a.swapaxes(1, 2) @ w, atol=1e-3 * np.abs(db).max())


def test_factors_are_drawn_and_trained_like_matrices():
    config = tiny_config()
    config.shrink.ranks = "out=6,up=12"
    with jax.set_mesh(mesh_of(config)):
        params = jax.jit(ModelSpec(config, "xla").init)(jax.random.key(0))
    up = params["blocks"]["mlp"]["up"]["kernel"]
    assert np.std(up["factor_in"][0] @ up["factor_out"][0]) == pytest.approx(0.02, rel=0.15)
    assert decay_mask(params)["blocks"]["mlp"]["up"]["kernel"] == dict.fromkeys(up, True)
    blocks = params["blocks"]["attention"]["out"]["kernel"]
    for name, factor in blocks.items():  # (4 heads, 8), 6 and 6, 32
        axes = inputs_outputs(f"blocks/attention/out/kernel/{name}")
        sizes = [math.prod(factor.shape[axis] for axis in side) for side in axes]
        assert sizes == {"factor_in": [32, 6], "factor_out": [6, 32]}[name]
    assert inputs_outputs("blocks/attention/query/kernel/factor_out") == ((1,), (2, 3))
    flat = as_matrices(params["blocks"])
    assert flat["attention"]["out"]["kernel"]["factor_in"].shape == (2, 32, 6)
    assert flat["attention"]["out"]["kernel"]["factor_out"].shape == (2, 6, 32)
