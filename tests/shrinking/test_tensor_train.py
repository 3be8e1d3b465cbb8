"""Embeddings as three cores: TT-SVD's error, and a model that computes with cores alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxgpt import convert, sample, shrink
from jaxgpt.checkpointing.checkpoints import concrete
from jaxgpt.config import ShrinkConfig
from jaxgpt.config.stored import read_config
from jaxgpt.config.validate import changed
from jaxgpt.distillation.divergence import distillation_losses
from jaxgpt.distillation.objective import output
from jaxgpt.inference.decode import Decoder, generate
from jaxgpt.inference.requests import Sampling
from jaxgpt.inference.trained import open_trained
from jaxgpt.interchange.init_from import completed
from jaxgpt.jobs.train import train
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import causal_lm, hidden
from jaxgpt.parameters.tensor_train import NAMES, Modes, decompose, digits
from jaxgpt.shrinking.low_rank import whole
from jaxgpt.system.trees import leaves_by_path
from tests.conftest import mesh_of, random_batch, tiny_config

FULL = 2**16  # ranks are no higher than serves


def test_digits():
    assert digits(50304) == (24, 16, 131) and digits(256) == (8, 4, 8) and digits(7) == (1, 1, 7)
    assert Modes.of((256, 32)).shapes(5) == [(8, 1, 4, 5), (4, 5, 2, 5), (8, 5, 4, 1)]


def test_the_error_falls_to_nothing_and_stays_below_what_was_cut_off():
    table = np.random.default_rng(0).normal(size=(24, 12))
    modes, errors = Modes.of(table.shape), []
    (v, u, w), (d, e, f) = modes
    apart = table.reshape(v, u, w, d, e, f).transpose(0, 3, 1, 4, 2, 5)
    first = np.linalg.svd(apart.reshape(v * d, -1), compute_uv=False)
    second = np.linalg.svd(apart.reshape(v * d * u * e, -1), compute_uv=False)
    for rank in (1, 2, 4, 8, FULL):
        cores = decompose(table, rank)
        assert [core.shape for core in cores] == modes.shapes(rank)
        a, b, c = cores
        row = a[1, 0] @ b[1].reshape(b.shape[1], -1)  # token (1, 1, 2): by hand
        row = row.reshape(-1, c.shape[1]) @ c[2].reshape(c.shape[1], -1)
        got = whole(cores, table.shape)
        np.testing.assert_allclose(got[(1 * u + 1) * w + 2], row.ravel(), atol=1e-12)
        errors.append(np.linalg.norm(got - table))
        assert errors[-1] ** 2 <= sum(first[rank:] ** 2) + sum(second[rank:] ** 2) + 1e-9
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9 < errors[-2]


@pytest.mark.parametrize("shape, tied", [((1, 1, 1), True), ((2, 2, 2), False)])
def test_full_rank_gives_the_same_logits_losses_and_gradients(shape, tied):
    """The cores' gradient is the tables', by the product that makes a table of cores."""
    config = tiny_config(shape, tie_embeddings=tied)
    tables = ("tokens",) if tied else ("tokens", "head")
    micro = jax.tree.map(lambda a: jnp.asarray(a[0]), random_batch(config))
    with jax.set_mesh(mesh_of(config)):
        params = jax.device_get(jax.jit(ModelSpec(config, "xla").init)(jax.random.key(0)))
        cores = {name: decompose(params[name], FULL) for name in tables}
        trains = {t: dict(zip(NAMES, cores[t], strict=True)) for t in tables}
        small = dataclasses.replace(config, shrink=ShrinkConfig(tensor_train=FULL))
        found = []
        for cfg, values in ((config, params), (small, params | trains)):
            spec = ModelSpec(cfg, "xla")

            def loss(p, cfg=cfg, spec=spec):
                model = spec.bind(p)
                logits = jax.sharding.reshard(model(micro["inputs"]), jax.P(None, None, None))
                x = hidden(model, micro, None)  # the teacher has the same table, and other states
                both = output(model, x), output(model, jax.lax.stop_gradient(-x))
                given = micro["targets"], 2.0, "forward", spec.rules
                soft = jnp.sum(distillation_losses(*both, *given).soft)
                return causal_lm(cfg)(model, micro, jax.random.key(1))[0] + soft, logits[..., :203]

            like = concrete(jax.eval_shape(spec.init, jax.random.key(0)))
            values = jax.tree.map(
                lambda a, w: jax.device_put(np.float32(a), w.sharding), values, like
            )
            found.append(jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(values)))
    ((want_loss, want), dense), ((got_loss, got), grads) = found
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    for name in tables:
        product = jax.vjp(lambda *c: jnp_whole(c, (256, 32)), *map(np.float32, cores[name]))
        for core, wanted in zip(NAMES, product[1](jnp.asarray(dense[name])), strict=True):
            atol = 1e-4 * np.abs(wanted).max()
            np.testing.assert_allclose(grads[name][core], wanted, atol=atol, err_msg=(name, core))
    kernels = [leaves_by_path(g)["blocks/mlp/up/kernel"] for g in (dense, grads)]
    np.testing.assert_allclose(*kernels, atol=1e-4 * np.abs(kernels[0]).max())


def jnp_whole(cores, shape):
    return jnp.einsum("urds,vset,wtfz->uvwdef", *cores).reshape(shape)


@pytest.fixture(scope="module")
def shrunk(trained_run, tmp_path_factory):
    """`shrunk(command) -> (workdir, the printed row)`: an embedding of rank 6."""
    made = []

    def get(command):
        if not made:
            out = tmp_path_factory.mktemp("tt") / "b"
            given = f"--workdir={trained_run}", f"--out={out}", "--method=tt:6", "--nospeed"
            code, text, err = command(shrink.main, *given)
            assert code == 0, err
            made.append((out, json.loads(text.splitlines()[-1])))
        return made[0]

    return get


def params_of(workdir):
    trained = open_trained(str(workdir), None)
    with jax.set_mesh(trained.mesh):
        return trained, jax.device_get(trained.params())


def test_the_workdir_holds_cores_and_the_commands_take_it(shrunk, trained_run, command, tmp_path):
    out, row = shrunk(command)
    trained, params = params_of(out)
    assert set(params["tokens"]) == set(NAMES)
    cores = sum(core.nbytes for core in params["tokens"].values())
    before = params_of(trained_run)[1]["tokens"].nbytes
    assert row["bytes_before"] - row["bytes_after"] == before - cores > 0
    assert read_config(epath.Path(out)).shrink.done == "tt:6"
    code, text, err = command(
        sample.main, f"--workdir={out}", "--prompt=The ", "--temperature=0", "--max_new_tokens=9"
    )
    assert code == 0 and text.startswith("The "), err
    code, _, err = command(convert.main, "export", f"--workdir={out}", f"--to={tmp_path}/hf")
    assert code == 0 and "checked" in err, err
    given = f"--workdir={trained_run}", f"--out={tmp_path}/b", "--method=tt:500"
    code, _, err = command(shrink.main, *given)
    assert code == 2 and "--method=tt:500 makes the embeddings no smaller" in err


def test_decoding_multiplies_the_cores(shrunk, command):
    trained, params = params_of(shrunk(command)[0])
    dense = params | {"tokens": np.float32(whole([*params["tokens"].values()], (384, 32)))}
    bare = dataclasses.replace(trained.config, shrink=ShrinkConfig())
    found = []
    with jax.set_mesh(trained.mesh):
        for config, values in ((trained.config, params), (bare, dense)):
            decoder = Decoder.of(ModelSpec(config, "xla"), jax.tree.map(jnp.asarray, values), 257)
            found.append(
                generate(decoder, [np.arange(5), np.arange(3)], 6, Sampling(temperature=0.0))
            )
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-5)


def test_cores_are_trained_on(shrunk, trained_run, command, tmp_path):
    out, _ = shrunk(command)
    config = read_config(epath.Path(trained_run))
    config = changed(config, {"init_from": str(out), "num_steps": 3})
    assert train(epath.Path(tmp_path / "w"), completed(config)) == 0
    before, after = (params_of(w)[1]["tokens"] for w in (out, tmp_path / "w"))
    for name in NAMES:
        assert before[name].shape == after[name].shape and np.any(before[name] != after[name])
