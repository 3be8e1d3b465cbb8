"""Every mesh trains the same model as one device: ten steps with everything on; and checkpoints go
from any mesh to any other.

A new mesh axis is a few lines of `MESHES`: alone, and in products with others.
"""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config import Config, MeshConfig
from jaxgpt.training.setup import make_training
from tests.conftest import mesh_of, random_batch, tiny_config

MODELS = {
    # windows in a pattern of layers, grouped queries, an untied head
    "dense": dict(
        position="rope",
        num_heads=8,
        num_kv_heads=4,
        window=5,
        full_attention_every=2,
        norm="rmsnorm",
        activation="swiglu",
        tie_embeddings=False,
        logit_softcap=9.0,
    ),
    # what a ring computes; dropout of attention weights is for gathered keys
    "ring": dict(position="rope", num_kv_heads=2, bias=False, dropout=0.0),
    # as many layers as four stages need for two rounds
    "deep": dict(
        num_layers=8,
        position="rope",
        num_kv_heads=2,
        norm="rmsnorm",
        activation="swiglu",
        tie_embeddings=False,
    ),
    # eight experts behind a biased router and a shared one; learned positions, a tied head
    "mixture": dict(
        num_experts=8,
        expert_dim=16,
        router="sigmoid_topk",
        shared_experts=1,
        activation="swiglu",
        bias=False,
        router_z_loss=1e-3,
    ),
}


def everything(model: str, **mesh) -> Config:
    """A run with dropout, packed documents, microbatches and recomputation on such a mesh."""
    compute = {"remat": "full"} | ({"context_attention": "ring"} if model == "ring" else {})
    config = tiny_config(**{"num_layers": 4, "dropout": 0.1} | MODELS[model], compute=compute)
    config.data.pack, config.optim.z_loss = True, 1e-3
    config.batch_size, config.grad_accum = 16, 2
    return dataclasses.replace(config, mesh=MeshConfig(**({"data": 1} | mesh)))


def ten_steps(config: Config):
    """(losses and gradient norms of ten steps, final parameters); packed where the config is."""
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        state, step, found = jax.jit(training.init)(), training.compile_step(), []
        for k in range(10):
            host = random_batch(config, seed=k)
            if config.data.pack:
                host |= random_documents(host["inputs"].shape, seed=k)
            batch = {n: jax.device_put(a, training.batch_sharding) for n, a in host.items()}
            state, metrics = step(state, batch)
            found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        assert int(state.step) == 10
        return np.array(found), jax.device_get(state.params)


def random_documents(shape, seed: int) -> dict[str, np.ndarray]:
    """Segments that begin anywhere, and positions that begin with them."""
    starts = np.random.default_rng(seed).random(shape) < 0.2
    starts[..., 0] = True
    at = np.broadcast_to(np.arange(shape[-1]), shape)
    first = np.maximum.accumulate(np.where(starts, at, 0), axis=-1)
    return {
        "segments": np.cumsum(starts, -1).astype(np.int32),
        "positions": (at - first).astype(np.int32),
    }


def assert_same(a, b):
    np.testing.assert_allclose(a[0], b[0], atol=1e-4, rtol=1e-4)
    # Adam divides by the gradient's size, so rounding noise in a gradient near 0 reaches
    # the parameters at the scale of the learning rate (1e-2) times its share of the steps
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), a[1], b[1])


@cache
def one_device(model: str):
    return ten_steps(everything(model))


SLOW = pytest.mark.slow
MESHES = [
    pytest.param("dense", dict(fsdp=8), marks=SLOW),
    ("dense", dict(tensor=4, sequence_activations=True)),
    ("dense", dict(context=2, fsdp=2, tensor=2)),
    pytest.param("ring", dict(context=4), marks=SLOW),
    pytest.param("dense", dict(context=4), marks=SLOW),
    pytest.param("dense", dict(context=2, tensor=2, sequence_activations=True), marks=SLOW),
    pytest.param("dense", dict(data=2, fsdp=2, tensor=2), marks=SLOW),
    pytest.param("dense", dict(data=2, fsdp=2, tensor=2, sequence_activations=True), marks=SLOW),
    pytest.param("deep", dict(pipeline=4), marks=SLOW),
    pytest.param("dense", dict(pipeline=2, data=2, tensor=2), marks=SLOW),
    pytest.param("dense", dict(pipeline=2, context=2, fsdp=2), marks=SLOW),
    pytest.param("mixture", dict(expert=4), marks=SLOW),
    pytest.param("mixture", dict(expert=2, fsdp=4), marks=SLOW),
    pytest.param("mixture", dict(data=2, expert=2, fsdp=2), marks=SLOW),
    pytest.param("mixture", dict(expert=2, context=2, fsdp=2), marks=SLOW),
    pytest.param("mixture", dict(expert=2, context=2, tensor=2), marks=SLOW),
]


@pytest.mark.parametrize(("model", "mesh"), MESHES)
def test_ten_steps_on_a_mesh_equal_one_device(model, mesh):
    assert_same(ten_steps(everything(model, **mesh)), one_device(model))


def test_checkpoints_go_from_any_mesh_to_any_other(tmp_path):
    """Saved on one mesh, restored onto the next, saved there, and so on: all bytes are the first's,
    and lie where the mesh has them."""
    turns = [dict(expert=2, context=2, fsdp=2), dict(tensor=4), dict(data=2, expert=4)]
    turns += [dict(context=4, fsdp=2), dict(fsdp=8), dict()]
    state = first = None
    for step, mesh_ in enumerate(turns, start=1):
        config = everything("mixture", **mesh_)
        with jax.set_mesh(mesh := mesh_of(config)):
            training = make_training(config, mesh)
            if state is None:
                state = jax.jit(training.init)()
                first = jax.device_get(state)
            else:
                reader = Checkpoints(tmp_path, read_only=True)
                state, _ = reader.restore(step - 1, training.abstract_state())
                jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), first)
                wanted = training.abstract_state().params
                for a, like in zip(*map(jax.tree.leaves, (state.params, wanted)), strict=True):
                    assert a.sharding.spec == like.sharding.spec, mesh_
            writer = Checkpoints(tmp_path, keep=1)
            writer.save(step, state, {"tokens": step})
            writer.close()
