"""What a mesh moves between devices; microbatches equal the batch; a golden curve."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.config import Config, MeshConfig, presets
from jaxgpt.config.validate import changed
from jaxgpt.data.chunks import ContiguousChunks
from jaxgpt.data.mixture import MixtureSchedule
from jaxgpt.data.pipeline import Stream, device_batches
from jaxgpt.parallel.fsdp import gather_weight, sum_gradient
from jaxgpt.parallel.lookup import embed_columns_to_rows
from jaxgpt.parallel.mesh import AXES, devices_along, make_mesh
from jaxgpt.parallel.replicas import sum_devices, sum_gradients
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parallel.torus import Torus, torus_of
from jaxgpt.planning.hardware import LIBTPU_ENVIRONMENT
from jaxgpt.planning.program import Program
from jaxgpt.system.accelerators import allow_absent
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path
from jaxgpt.training.setup import make_training
from jaxgpt.training.step import make_train_step
from tests.conftest import CORPUS, mesh_of, random_batch, tiny_config
from tests.training.test_meshes import assert_same, ten_steps

GOLDEN = Path(__file__).parent.parent / "golden" / "curve.json"


SPLITS = pytest.mark.parametrize(
    ("sizes", "phases"),
    [
        ({"fsdp": 8}, (2, 4)),
        ({"fsdp": 8}, (4, 2)),
        ({"fsdp": 8}, (2, 2, 2)),
        ({"fsdp": 2, "expert": 2, "context": 2}, (2,)),
        ({"data": 2, "context": 2, "pipeline": 2}, (1,)),
    ],
)


def split_mesh(sizes: dict, phases: tuple):
    """A mesh of axes of these sizes, and the rules for it."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))
    return mesh, AxisRules(axes=tuple(sizes), torus=Torus(phases))


@SPLITS
def test_gathers_and_trades_move_and_nothing_else(sizes, phases):
    """Weights come together in order; each device gets all columns of its rows, and gives back
    theirs."""
    mesh, rules = split_mesh(sizes, phases)
    weight, x = (np.random.default_rng(0).normal(size=shape) for shape in ((3, 16), (16, 6, 32)))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda a: gather_weight(a, rules))(
            jax.device_put(weight, rules(None, "embed"))
        )
        assert found.sharding.is_fully_replicated
        np.testing.assert_array_equal(found, weight.astype(found.dtype))
        columns = jax.device_put(x, rules("lookup_batch", "lookup_seq", "embed"))
        rows, back = jax.jit(lambda a: jax.vjp(lambda a: embed_columns_to_rows(a, rules), a))(
            columns
        )
        assert rows.sharding.spec == rules("batch", "seq", None)
        np.testing.assert_array_equal(rows, columns)
        (returned,) = jax.jit(back)(rows)
        assert returned.sharding == columns.sharding
        np.testing.assert_array_equal(returned, columns)


@SPLITS
def test_sums_of_gradients_are_sums(sizes, phases):
    mesh, rules = split_mesh(sizes, phases)
    own = np.random.default_rng(0).normal(size=(8, 3, 16)).astype(np.float32)
    spec = rules(None, "embed")
    with jax.set_mesh(mesh):
        given = jax.device_put(own, jax.P(rules.rows))
        found = jax.jit(lambda a: sum_gradient(a, spec, rules))(given)
        assert found.sharding.spec == spec
    np.testing.assert_allclose(found, own.sum(axis=0), rtol=1e-5, atol=1e-6)


def test_experts_are_split_by_expert_and_the_rest_by_everything():
    rules = AxisRules(axes=("fsdp", "expert", "context"))
    assert rules("embed", "mlp") == jax.P(("fsdp", "expert", "context"), None)
    assert rules("experts", "embed", "mlp") == jax.P("expert", ("fsdp", "context"), None)


def test_gradients_cross_data_once_a_step():
    """With two microbatches: that of every large matrix; norms and positions in each microbatch."""
    config = tiny_config((2, 2), bias=False, num_layers=1)
    config.grad_accum = 2
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        program = Program(training.compile_step().as_text())
        params = leaves_by_path(training.abstract_state().params)
    split = (a for path, a in params.items() if "kernel" in path or path == "tokens")
    large = sum(a.size * 4 // 2 for a in split) - params["positions/kernel"].size * 2
    found = [c for c in program.collectives(AXES, mesh.devices.shape) if "data" in c.axis]
    assert sum(c.bytes for c in found if c.count == 1) == large
    assert 0 < sum(c.bytes * c.count for c in found if c.count > 1) < 0.2 * large


READINGS = {
    "int8": {"compute.matmul": "int8"},
    "lora": {"lora.rank": 2},
    "smoothing": {"optim.label_smoothing": 0.1},
    "rounded": {"compute.fake_quantise": "int8"},
    "encoder": {"model.kind": "encoder", "objective": "masked_lm", "model.head_bias": True},
    "two stacks": {"model.kind": "encoder_decoder", "model.encoder_layers": 1}
    | {"model.max_source_len": 16, "objective": "seq2seq"},
}


@pytest.mark.parametrize("reading", READINGS)
def test_however_parameters_are_read_their_gradients_may_be_summed_later(reading):
    config = changed(tiny_config((2, 2), num_layers=1), READINGS[reading] | {"grad_accum": 2})
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        step = make_train_step(training.spec, config, training.companions.specs)
        state = training.abstract_state()
        new, _ = jax.eval_shape(step, state, training.abstract_batch())
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_gradients_are_summed_over_data_in_the_dtype_that_is_asked_for():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    one = 1 + 2**-9  # which bfloat16 does not have

    def total(own, dtype):
        return sum_gradients({"g": sum_devices(own, jax.P(reduced={"data"}))}, dtype)["g"]

    with jax.set_mesh(mesh):
        own = jax.device_put(np.full((2, 4), one, np.float32), jax.P("data"))
        for dtype, wanted in (("", 2 * one), ("bfloat16", 2.0)):
            found = jax.jit(total, static_argnums=1)(own, dtype)
            assert found.dtype == np.float32 and found.sharding.is_fully_replicated
            np.testing.assert_array_equal(found, np.full(4, wanted, np.float32))


class Chip:
    def __init__(self, *coords):
        self.coords = coords


@pytest.mark.parametrize(
    ("coords", "phases"),
    [
        ([(x, y, 0) for x in range(2) for y in range(4)], (2, 4)),
        ([(x, y, 0) for y in range(4) for x in range(2)], (4, 2)),
        ([(x, y, z) for x in range(2) for y in range(2) for z in range(2)], (2, 2, 2)),
        ([(x, 0, 0) for x in range(8)], (8,)),
        ([(x, 0, 0) for x in (0, 1, 2, 3)] + [(x, 1, 0) for x in (3, 2, 1, 0)], (8,)),  # a snake
    ],
)
def test_phases_follow_the_torus(coords, phases):
    assert torus_of(np.array([Chip(*c) for c in coords])) == Torus(phases)
    mesh = mesh_of(tiny_config((1, 8, 1)))
    assert torus_of(devices_along(mesh, "fsdp")) == Torus((8,)), "no torus here"


def test_parameters_and_optimizer_state_are_split():
    config = tiny_config((1, 4, 2))
    with jax.set_mesh(mesh := mesh_of(config)):
        state = jax.jit(make_training(config, mesh).init)()
    adam = state.opt_state[1]
    for tree in (state.params, adam.mu, adam.nu):
        query = tree["blocks"]["attention"]["query"]["kernel"]
        assert query.addressable_shards[0].data.shape == (2, 32 // 4, 4 // 2, 8)
        assert tree["tokens"].addressable_shards[0].data.shape == (256 // 2, 32 // 4)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_fsdp_gathers_each_weight_once_a_pass(remat):
    """Forward and backward: no policy keeps gathered weights, which are as large as the model."""
    config = tiny_config(compute={"remat": remat, "scan_layers": "true"})
    config.mesh = MeshConfig(data=1, fsdp=8)
    with jax.set_mesh(mesh := make_mesh(config)):
        training = make_training(config, mesh)
        program = Program(training.compile_step().as_text())
        blocks = training.abstract_state().params["blocks"]
    kernels = sum(leaf.size * 4 for leaf in jax.tree.leaves(blocks) if "fsdp" in leaf.sharding.spec)
    found = [c for c in program.collectives(AXES, mesh.devices.shape) if c.kind == "all-gather"]
    in_layers = sum(c.count * c.bytes for c in found if c.count > 1)
    assert in_layers == 2 * kernels


def test_grad_accum_changes_memory_and_nothing_else():
    plain = tiny_config()
    assert_same(ten_steps(dataclasses.replace(plain, grad_accum=4)), regroup(plain))


def regroup(config: Config):
    """Ten steps on the batches that `random_batch` makes for grad_accum=4, in one microbatch."""
    four = dataclasses.replace(config, grad_accum=4)
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        state, step, found = jax.jit(training.init)(), training.compile_step(), []
        for k in range(10):
            host = random_batch(four, seed=k)
            host = {n: a.reshape(1, config.batch_size, -1) for n, a in host.items()}
            batch = {n: jax.device_put(a, training.batch_sharding) for n, a in host.items()}
            state, metrics = step(state, batch)
            found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return np.array(found), jax.device_get(state.params)


def curve() -> list[float]:
    """Twenty steps on the licence's bytes: data order, init, dropout, schedule and update."""
    config = tiny_config(vocab_size=257, dropout=0.1)
    config = dataclasses.replace(config, num_steps=20, seed=7, grad_accum=2)
    config.optim.learning_rate = 3e-3
    tokens = np.frombuffer(CORPUS.encode(), np.uint8)
    source = ContiguousChunks(tokens, config.model.max_seq_len)
    stream = Stream((source,), MixtureSchedule((Fraction(1),)), config.batch_size, 2, 7, True)
    losses = []
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        state, step = jax.jit(training.init)(), training.compile_step()
        for batch in device_batches(stream, training.batch_sharding, 0, 20):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses


def test_golden_curve():
    """To accept an intended change: python -m tests.training.test_sharding"""
    np.testing.assert_allclose(
        curve(),
        json.loads(GOLDEN.read_text()),
        atol=2e-4,
        rtol=0,
        err_msg="if intended: JAX_PLATFORMS=cpu python -m tests.training.test_sharding",
    )


@pytest.fixture
def topology(monkeypatch):
    """JAX's `get_topology_desc`, in an environment that libtpu takes."""
    from jax.experimental import topologies

    allow_absent()
    jax.devices()  # the CPU's flags are read here; libtpu ends the process over those it lacks
    for name, value in (LIBTPU_ENVIRONMENT | {"XLA_FLAGS": ""}).items():
        monkeypatch.setenv(name, value)
    return topologies.get_topology_desc


@pytest.mark.tpu_compile
def test_the_train_step_compiles_for_a_tpu_slice(topology):
    """The very step, for eight v5e chips, sharded every way at once."""
    devices = topology("v5e:2x4", platform="tpu").devices
    config = tiny_config(
        (2, 2, 2),
        compute={"dtype": "bfloat16", "remat": "dots"},
        max_seq_len=128,
        embed_dim=256,
        position="rope",
        num_kv_heads=2,
        window=40,
    )
    config = dataclasses.replace(config, grad_accum=2, mesh=MeshConfig(2, 2, 2))
    config.data.pack = True
    with jax.set_mesh(mesh := make_mesh(config, list(devices))):
        compiled = make_training(config, mesh).compile_step()
    memory = compiled.memory_analysis()
    assert 0 < memory.argument_size_in_bytes < 16e9
    text = compiled.as_text()
    assert "all-reduce" in text or "reduce-scatter" in text
    kernels = {name for name in ("fwd", "dq", "dkv") if f"%splash_mha_{name}" in text}
    assert kernels == {"fwd", "dq", "dkv"}


@pytest.mark.tpu_compile
@pytest.mark.parametrize("kind, kernel", [("bert", "splash"), ("bart", "splash"), ("t5", "xla")])
def test_every_kind_compiles_for_a_tpu_slice(topology, kind, kernel):
    """Splash attends to an encoder's output of another length too."""
    lengths = dict(vocab_size=1000, max_seq_len=128)
    two = lengths | dict(kind="encoder_decoder", max_source_len=256)
    model = {
        "bert": lambda: presets.bert(2, 4, 256, **lengths),
        "bart": lambda: presets.gpt2(2, 4, 256, **two, embedding_norm=True),
        "t5": lambda: presets.t5(2, 4, 256, 512, **two),
    }[kind]()
    objective = "causal_lm" if kind == "bert" else "seq2seq"
    config = dataclasses.replace(tiny_config(), model=model.with_sizes(), objective=objective)
    config = dataclasses.replace(config, batch_size=16, mesh=MeshConfig(2, 2, 2))
    config.compute.dtype = "bfloat16"
    devices = topology("v5e:2x4", platform="tpu").devices
    with jax.set_mesh(mesh := make_mesh(config, list(devices))):
        training = make_training(config, mesh)
        text = training.compile_step().as_text()
    kernels = {name for name in ("fwd", "dq", "dkv") if f"%splash_mha_{name}" in text}
    assert training.spec.kernel == kernel and len(kernels) == 3 * (kernel == "splash")


@pytest.mark.tpu_compile
def test_data_goes_over_slices_and_nothing_else_does(topology):
    two = topology("v5e:2x2", platform="tpu", num_slices=2).devices
    config = dataclasses.replace(tiny_config(), mesh=MeshConfig(data=-1, fsdp=2))
    mesh = make_mesh(config, list(two))
    assert mesh.devices.shape[:2] == (4, 2)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    alone = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=-1))
    with pytest.raises(BadInput, match="mesh.data=1 cannot go over 2 slices"):
        make_mesh(alone, list(two))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(curve(), indent=1) + "\n")
