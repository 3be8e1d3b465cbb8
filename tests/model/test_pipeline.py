"""Layers in stages: the schedule, that it computes what a loop over the layers computes, and what
is refused. Whole models: `tests/training/test_meshes.py`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import MeshConfig
from jaxgpt.config.pipeline import Schedule, schedule_of
from jaxgpt.model.pipeline.stages import pipelined, stages_of
from jaxgpt.ops.matmul import PLAIN
from jaxgpt.parallel.fsdp import product
from jaxgpt.parallel.mesh import AXES, mesh_shape
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.planning.program import Program
from jaxgpt.system.errors import BadInput
from tests.conftest import mesh_of, tiny_config

LAYERS, ROWS, LENGTH, WIDTH = 12, 24, 3, 8


def one_layer(x, y, shift, offsets):
    """x + tanh(y + shift + offsets), and the mean of its squares."""
    x = x + jnp.tanh(y + shift + offsets[..., None])
    return x, jnp.mean(jnp.square(x))


def in_order(params, x, offsets):
    """All layers one after the other."""
    losses = []
    for w, shift in zip(params["kernel"], params["shift"], strict=True):
        x, loss = one_layer(x, x @ w, shift, offsets)
        losses.append(loss)
    return x, sum(losses)


def staged(rules: AxisRules):
    """The same as `pipelined` wants it."""

    def layers(params, x, offsets, keys, key_of):
        losses = []
        for w, shift in zip(params["kernel"], params["shift"], strict=True):
            out = rules("batch", None, None)
            y = product("MD,DE->ME", x, w, out, rules, PLAIN)
            x, loss = one_layer(x, y, shift, offsets)
            losses.append(loss)
        return x, {"size": sum(losses)}

    return layers


@pytest.mark.parametrize(
    ("mesh", "rounds", "microbatches"),
    [(dict(pipeline=4), 3, 4), (dict(pipeline=4), 1, 6), (dict(pipeline=2, fsdp=2), 3, 3)],
)
def test_stages_compute_what_a_loop_over_the_layers_computes(mesh, rounds, microbatches):
    """Values and gradients, in so many ticks as the schedule says, each weight gathered once a
    pass."""
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(size=(LAYERS, WIDTH, WIDTH)) / 8,
        "shift": rng.normal(size=(LAYERS, WIDTH)),
    }
    x, offsets = rng.normal(size=(ROWS, LENGTH, WIDTH)), rng.normal(size=(ROWS, LENGTH))
    given = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x, offsets))
    towards = jnp.cos(jnp.arange(x.size)).reshape(x.shape)

    def score(y, loss):
        return jnp.sum(y * towards) + loss

    expected = jax.value_and_grad(lambda *a: score(*in_order(*a)), argnums=(0, 1))(*given)

    config = tiny_config(num_layers=LAYERS, compute=dict(pipeline_rounds=rounds))
    config.compute.pipeline_microbatches = microbatches
    config = dataclasses.replace(config, batch_size=ROWS, mesh=MeshConfig(**{"data": 1} | mesh))
    with jax.set_mesh(device_mesh := mesh_of(config)):
        rules = AxisRules(axes=tuple(mesh))
        stages, inside = stages_of(config, rules)
        params, x, offsets = given
        spec = jax.P("pipeline", *inside("embed", None))
        kernel = jax.device_put(params["kernel"], spec)
        params = {"kernel": kernel, "shift": jax.device_put(params["shift"], jax.P("pipeline"))}
        rows = rules("batch", None, None)
        x, offsets = jax.device_put(x, rows), jax.device_put(offsets, rules("batch", None))

        def run(params, x, offsets):
            y, losses = pipelined(staged(inside), stages, params, x, offsets, None)
            return score(y, losses["size"])

        step = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))
        compiled = step.lower(params, x, offsets).compile()
        found = compiled(params, x, offsets)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )
    collectives = Program(compiled.as_text()).collectives(AXES, device_mesh.devices.shape)
    sent = sum(c.count for c in collectives if c.kind == "collective-permute")
    assert sent == 2 * stages.schedule.ticks  # a result forward, a gradient back
    if jax.__version_info__ >= (0, 12):  # before that the parameters are gathered at once too
        gathers = sum(c.count for c in collectives if (c.kind, c.axis) == ("all-gather", "fsdp"))
        assert gathers == (2 * rounds if "fsdp" in mesh else 0)


def test_the_schedule_and_its_bubble():
    """Four stages, 20 rounds, 4 microbatches: 83 ticks, of which each stage works in 80."""
    at = Schedule(stages=4, rounds=20, microbatches=4)
    assert (at.ticks, at.bubble) == (83, 3 / 83)
    config = tiny_config(num_layers=12, window=4, full_attention_every=3)
    assert schedule_of(config, 2) == Schedule(2, 2, 2)  # the pattern is not cut


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(num_layers=6),
            "num_layers=6 cannot be .* mesh.pipeline=4 .* make it a multiple of 4,",
        ),
        (dict(compute=dict(pipeline_rounds=3)), "compute.pipeline_rounds=3 = 12"),
        (dict(compute=dict(pipeline_microbatches=2)), "is less than mesh.pipeline=4"),
        (dict(compute=dict(pipeline_microbatches=5)), "microbatches=5 .* a multiple of 20$"),
        (dict(position="relative"), "model.position=relative"),
        (dict(lora=dict(rank=4)), "lora.rank=4, .* set mesh.pipeline=1"),
    ],
)
def test_what_cannot_be_dealt_to_stages_is_refused(fields, message):
    config = tiny_config(**dict(num_layers=8) | fields)
    config.mesh = MeshConfig(data=1, pipeline=4)
    with pytest.raises(BadInput, match=message):
        mesh_shape(config, 4)
