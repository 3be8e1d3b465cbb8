"""Quantisation-aware training: what is read is what will be stored, and the gradient is that at the
rounded weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from jaxgpt import convert, shrink
from jaxgpt.config import ShrinkConfig
from jaxgpt.config.stored import read_config
from jaxgpt.config.validate import changed
from jaxgpt.inference.decode import generate
from jaxgpt.inference.requests import Sampling
from jaxgpt.inference.trained import open_trained
from jaxgpt.jobs.train import train
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import causal_lm
from jaxgpt.parameters.fake import read
from jaxgpt.parameters.quantised import Format
from jaxgpt.parameters.weights import dense
from jaxgpt.shrinking.quantise import nearest
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path
from tests.conftest import mesh_of, random_batch, tiny_config
from tests.parameters.test_quantised import back


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("kind, group", [("int8", 0), ("int8", 8), ("int4", 0), ("int4", 8)])
def test_what_is_read_is_what_numpy_stores(kind, group, shape):
    """To the bit: odd sizes, rows of zeros, scales that bfloat16 has to round up."""
    fmt, rng = Format(kind, group), np.random.default_rng(0)
    with jax.set_mesh(mesh_of(tiny_config(shape))):
        for axis, (sizes, spec) in (
            (-2, ((32, 6), jax.P("fsdp", "tensor"))),
            (-2, ((16, 6), jax.P(("data", "fsdp"), "tensor"))),  # a group of 8 on two devices
            (-1, ((5, 21), None)),
        ):
            w = rng.standard_t(2, sizes).astype(np.float32)
            w[:, 0] = 0
            on_device = jax.device_put(w, spec or jax.P())
            got = jax.jit(lambda w, axis=axis: read(fmt, w, axis, "float32"))(on_device)
            want = back(fmt, *fmt.quantise(w, axis), axis, sizes[axis])
            np.testing.assert_array_equal(got, want)
            assert np.any(got != w)
            assert got.sharding.is_equivalent_to(on_device.sharding, 2)


MODELS = [
    ("int8", dict(tie_embeddings=False), ShrinkConfig()),
    ("int4", dict(activation="swiglu", num_kv_heads=2), ShrinkConfig(group=12, keep="up")),
    ("int4", {}, ShrinkConfig(ranks="query=5,out=7")),
]


@pytest.mark.parametrize("shape", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind, model, stored", MODELS)
def test_loss_and_gradient_are_those_at_the_rounded_weights(kind, model, stored, shape):
    """Straight-through: of the plain model whose weights are the rounded ones."""
    plain = dataclasses.replace(tiny_config(shape, position="learned", **model), shrink=stored)
    fake = dataclasses.replace(plain.compute, fake_quantise=kind)
    micro = jax.tree.map(lambda a: jnp.asarray(a[0]), random_batch(plain))
    form = dataclasses.replace(stored, weights=kind, group=stored.group or (kind == "int4") * 32)
    with jax.set_mesh(mesh_of(plain)):
        params = jax.jit(ModelSpec(plain, "xla").init)(jax.random.key(0))
        wanted = jax.eval_shape(ModelSpec(plain, "xla").init, jax.random.key(0))
        rounded = dense(nearest(jax.device_get(params), form, "head"), form, wanted)

        def gradient(config, params):
            def loss(params):
                model = ModelSpec(config, "xla").bind(params)
                return causal_lm(config)(model, micro, jax.random.key(1))[0]

            params = jax.tree.map(lambda a, w: jax.device_put(a, w.sharding.spec), params, wanted)
            found = jax.jit(jax.value_and_grad(loss))(params)
            return jax.tree.map(np.asarray, found)

        loss, got = gradient(dataclasses.replace(plain, compute=fake), params)
        want_loss, want = gradient(plain, rounded)
        unrounded, _ = gradient(plain, params)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    assert abs(loss - unrounded) > 3e-6 * loss
    got, want = leaves_by_path(got), leaves_by_path(want)
    largest = max(np.abs(leaf).max() for leaf in want.values())
    for path, leaf in want.items():  # a key's bias has no gradient but rounding
        atol = max(2e-5 * np.abs(leaf).max(), 1e-7 * largest)
        np.testing.assert_allclose(got[path], leaf, atol=atol, err_msg=path)


@pytest.fixture(scope="module")
def tuned(trained_run, tmp_path_factory):
    """A run that goes on for a few steps with int4 weights."""
    out = tmp_path_factory.mktemp("fake") / "w"
    config = changed(
        read_config(epath.Path(trained_run)),
        {
            "init_from": str(trained_run),
            "compute.fake_quantise": "int4",
            "shrink.group": 64,
            "shrink.keep": "down",
            "num_steps": 4,
        },
    )
    assert train(epath.Path(out), config) == 0
    return out


@pytest.mark.slow
def test_shrink_stores_what_was_trained(tuned, command, tmp_path):
    """Group and what stays float are the run's; the nearest, without calibration, is exact."""
    out = tmp_path / "b"
    given = f"--workdir={tuned}", f"--out={out}", "--method=int4", "--nospeed"
    code, text, err = command(shrink.main, *given)
    assert code == 0, err
    row = json.loads(text.splitlines()[-1])
    assert row["bits_per_byte_after"] == pytest.approx(row["bits_per_byte_before"], abs=1e-5)
    small = read_config(epath.Path(out))
    assert (small.shrink.group, small.shrink.keep) == (64, "down")
    assert small.compute.fake_quantise == "none"
    rows = map(json.loads, (tuned / "metrics.jsonl").read_text().splitlines())
    trained = [row["bits_per_byte"] for row in rows if row["split"] == "validation"][-1]
    assert trained == pytest.approx(row["bits_per_byte_after"], abs=1e-5)
    written = []
    for workdir in (tuned, out):
        model = open_trained(str(workdir), None)
        with jax.set_mesh(model.mesh):
            greedy = Sampling(temperature=0.0)
            written.append(generate(model.decoder(), [np.arange(5)], 12, greedy))
    np.testing.assert_array_equal(*(tokens for tokens, _ in written))
    np.testing.assert_allclose(*(logprobs for _, logprobs in written), atol=2e-5)
    folders = []
    for workdir, name in ((tuned, "x"), (out, "y")):
        to = f"--to={tmp_path}/{name}"
        code, _, err = command(convert.main, "export", f"--workdir={workdir}", to)
        assert code == 0, err
        folders.append(load_file(tmp_path / name / "model.safetensors"))
    for name, array in folders[0].items():
        np.testing.assert_array_equal(array, folders[1][name], err_msg=name)


def test_what_it_cannot_go_with_is_said():
    config = tiny_config()
    for values in ({"lora.rank": 4}, {"shrink.weights": "int4", "lora.rank": 4}):
        with pytest.raises(BadInput, match="compute.fake_quantise='int8' with lora.rank=4"):
            changed(config, {"compute.fake_quantise": "int8"} | values)
