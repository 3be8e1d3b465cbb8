"""Mixtures in training: what the loss is, the router's balance, what a mesh moves; ten steps on
meshes are in test_meshes.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import Config, MeshConfig
from jaxgpt.parallel.mesh import AXES
from jaxgpt.planning.program import Program
from jaxgpt.training.objectives import OBJECTIVES
from jaxgpt.training.setup import make_training
from tests.conftest import mesh_of, random_batch, tiny_config


def mixture(mesh=(1, 1, 1, 1), compute=None, **fields) -> Config:
    """Eight experts behind a biased router, a shared one, packed documents, microbatches."""
    given = dict(num_experts=8, expert_dim=16, router="sigmoid_topk", shared_experts=1)
    given |= dict(activation="swiglu", bias=False, router_z_loss=1e-3) | fields
    config = tiny_config(compute=compute or {"remat": "full"}, **given)
    config.data.pack, config.batch_size, config.grad_accum = True, 16, 2
    return dataclasses.replace(config, mesh=MeshConfig(*mesh))


def steps(config: Config, count: int) -> tuple:
    """(the metrics of each step on the same batch, the last state)."""
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        state, step, rows = jax.jit(training.init)(), training.compile_step(), []
        host = random_batch(config)
        if config.data.pack:
            host |= {
                "segments": np.ones_like(host["inputs"]),
                "positions": np.zeros_like(host["inputs"]),
            }
        batch = {n: jax.device_put(a, training.batch_sharding) for n, a in host.items()}
        for _ in range(count):
            state, metrics = step(state, batch)
            rows.append(jax.device_get(metrics))
        return rows, jax.device_get(state)


def test_the_routers_biases_even_the_load():
    """By a step of `router_bias_rate` each against the sign of the excess, and by nothing else."""
    config = mixture(balance_loss=0.0, router_z_loss=0.0, router_bias_rate=0.005)
    config.optim.learning_rate = 1e-9
    rows, state = steps(config, 30)
    loads = [row["expert_load"] for row in rows]
    assert loads[0] > 2.4 and np.mean(loads[-5:]) < 1.7, loads
    biases = state.params["blocks"]["mlp"]["router"]["bias"]
    np.testing.assert_allclose(biases, np.round(biases / 0.005) * 0.005, atol=1e-6)
    assert 0.02 < np.abs(biases).max() <= 30.01 * 0.005
    np.testing.assert_allclose(rows[0]["expert_share"].sum(), 1, rtol=1e-6)


ENCODERS = ["masked_lm_nsp", "classification", "token_classification", "span_qa"]
ENCODERS = ["masked_lm", *(pytest.param(name, marks=pytest.mark.slow) for name in ENCODERS)]


@pytest.mark.parametrize("objective", ["causal_lm", *ENCODERS])
def test_auxiliary_losses_reach_the_loss(objective):
    """Times the number of targets, as the objective returns sums; the logged loss is without."""

    def total(weight: float):
        kind = "decoder" if objective == "causal_lm" else "encoder"
        config = tiny_config(num_experts=4, balance_loss=weight, num_layers=1, kind=kind)
        config.objective = objective
        for cfg in (config.objectives.classification, config.objectives.token_classification):
            cfg.labels = "a,b"
        with jax.set_mesh(mesh := mesh_of(config)):
            training = make_training(config, mesh)
            model = training.spec.bind(training.spec.init(jax.random.key(0)))
            micro = {name: jnp.asarray(a[0]) for name, a in random_batch(config).items()}
            ones = jnp.ones_like(micro["inputs"])
            micro |= {"segments": ones, "context": ones, "labels": ones[:, 0], "spans": ones[:, :2]}
            if objective == "token_classification":
                micro["targets"] = ones
            own = training.companions.own_parameters(training.spec)
            minimised = OBJECTIVES[objective](config)
            return jax.jit(lambda micro: minimised(model, micro, jax.random.key(0), **own))(micro)

    without, with_ = total(0.0), total(0.5)
    count, figures = with_[1], with_[2]
    assert figures["balance_loss"] / count > 1 and "auxiliary_loss" not in figures
    np.testing.assert_allclose(with_[0], without[0] + 0.5 * figures["balance_loss"], rtol=1e-6)
    assert with_[2]["loss"] == without[2]["loss"]


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_gradients_of_experts_are_scattered_and_weights_gathered_once_a_pass(remat):
    compute = {"remat": remat, "scan_layers": "true"}
    config = mixture((1, 4, 1, 2), compute, shared_experts=0, expert_dim=24)
    config.grad_accum = 1
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        program = Program(training.compile_step().as_text())
        experts = training.abstract_state().params["blocks"]["mlp"]["experts"]
    one = {leaf.size // 2 // 2 * 4 for leaf in jax.tree.leaves(experts)}  # of a layer and a device
    found = program.collectives(AXES, mesh.devices.shape)
    assert len(one) == 1
    gathers = sum(c.count for c in found if c.kind == "all-gather" and c.bytes in one)
    scatters = sum(c.count for c in found if c.kind == "reduce-scatter" and c.axis == "fsdp")
    assert gathers == 2 * 3 * 2, "three matrices of two layers, forward and backward"
    assert scatters >= 3 * 2
    assert not [c for c in found if c.kind == "all-reduce" and c.bytes in one]
    assert sum(c.count for c in found if c.kind == "all-to-all" and c.axis == "expert") >= 4
