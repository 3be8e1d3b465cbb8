"""LoRA on weights in few bits: what is trained, what is not, and its gradient."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxgpt import evaluate, sample, shrink, train
from jaxgpt.config import LoraConfig, ShrinkConfig
from jaxgpt.config.stored import read_config
from jaxgpt.inference.trained import open_trained
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import causal_lm
from jaxgpt.optim.groups import join, split, trainable
from jaxgpt.parameters.lora import is_addition
from jaxgpt.parameters.weights import dense
from jaxgpt.shrinking.quantise import nearest
from jaxgpt.system.trees import leaves_by_path
from tests.conftest import config_flag, mesh_of, random_batch, tiny_config

NF4 = ShrinkConfig(weights="nf4", group=32)
LORA = {"rank": 4, "targets": "query,value,out,up,down"}


def test_the_gradient_is_that_over_the_floats_that_are_meant():
    floats = tiny_config(lora=LORA)
    small = dataclasses.replace(floats, shrink=NF4)
    bare = dataclasses.replace(floats, lora=LoraConfig())
    micro = jax.tree.map(lambda a: jnp.asarray(a[0]), random_batch(floats))

    def gradient(config, params):
        trained, frozen = split(params, trainable(params, "", 4))

        def loss(trained):
            model = ModelSpec(config, "xla").bind(join(trained, frozen))
            return causal_lm(config)(model, micro, jax.random.key(1))[0]

        return leaves_by_path(jax.jit(jax.grad(loss))(trained))

    with jax.set_mesh(mesh_of(floats)):
        params = jax.jit(ModelSpec(floats, "xla").init)(jax.random.key(0))
        params = jax.tree.map(lambda a: a + 0.02, params)  # B of the additions is not zero
        stored = nearest(jax.device_get(params), NF4, "head")
        wanted = jax.eval_shape(ModelSpec(bare, "xla").init, jax.random.key(0))
        got = gradient(small, jax.tree.map(jnp.asarray, stored))
        want = gradient(floats, jax.tree.map(jnp.asarray, dense(stored, NF4, wanted)))
    assert got.keys() == want.keys() and len(got) == 10 and all(map(is_addition, got))
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, atol=1e-5 * np.abs(leaf).max(), err_msg=path)


@pytest.fixture(scope="module")
def tuned(trained_run, tmp_path_factory):
    """`tuned(command) -> (base, fine-tuned workdir, the flags that made it)`, made once."""
    folder, made = tmp_path_factory.mktemp("qlora"), []

    def get(command):
        return made[0] if made else made.append(make(command)) or made[0]

    def make(command):
        base = folder / "base"
        given = f"--workdir={trained_run}", f"--out={base}", "--method=nf4", "--calibration=0"
        assert command(shrink.main, *given)[0] == 0
        config = read_config(epath.Path(trained_run))
        sizes = ("num_layers", "embed_dim", "num_heads", "max_seq_len")
        fields = {f"model.{name}": getattr(config.model, name) for name in sizes} | {
            "data.source": config.data.source,
            "data.cache_dir": config.data.cache_dir,
            "init_from": base,
            "lora.rank": 4,
            "batch_size": 8,
            "optim.learning_rate": 0.01,
            "optim.warmup_steps": 0,
            "optim.schedule": "constant",
            "num_steps": 40,
            "log_every": 1,
            "checkpoint_every": 20,
            "eval_every": 0,
            "sample.max_new_tokens": 0,
        }
        given = [f"--config.{name}={value}" for name, value in fields.items()]
        flags = [config_flag(folder), *given]
        code, _, err = command(train.main, f"--workdir={folder / 'w'}", *flags)
        assert code == 0, err
        return base, folder / "w", flags

    return get


def stored_in(workdir, step=None) -> dict:
    trained = open_trained(str(workdir), step)
    with jax.set_mesh(trained.mesh):
        return leaves_by_path(jax.device_get(trained.params()))


@pytest.mark.slow
def test_only_the_additions_move(tuned, command):
    base, workdir, _ = tuned(command)
    assert read_config(epath.Path(workdir)).shrink.weights == "nf4"
    before, after = stored_in(base), stored_in(workdir)
    assert {path for path in after if is_addition(path)} == after.keys() - before.keys()
    assert any(leaf.dtype == np.uint8 for leaf in before.values())
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    assert all(np.any(after[path]) for path in after.keys() - before.keys())


@pytest.mark.slow
def test_the_loss_falls_and_the_commands_take_it(tuned, command):
    _, workdir, _ = tuned(command)
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert np.mean(losses[-9:]) < np.mean(losses[:9]) - 0.02
    assert command(evaluate.main, f"--workdir={workdir}")[0] == 0
    given = "--prompt=The", "--max_new_tokens=4", "--temperature=0"
    code, text, _ = command(sample.main, f"--workdir={workdir}", *given)
    assert code == 0 and text.startswith("The")


@pytest.mark.slow
def test_it_resumes_bit_for_bit(tuned, command, tmp_path):
    _, workdir, flags = tuned(command)
    first = [*flags, f"--workdir={tmp_path}/w", "--config.num_steps=20"]
    assert command(train.main, *first)[0] == 0
    assert command(train.main, *flags, f"--workdir={tmp_path}/w")[0] == 0
    for path, leaf in stored_in(workdir).items():
        np.testing.assert_array_equal(stored_in(tmp_path / "w")[path], leaf, err_msg=path)


@pytest.mark.slow
def test_what_is_not_possible_is_said(tuned, command, tmp_path):
    _, workdir, flags = tuned(command)
    for flag, message in (
        ("--config.lora.dora=true", "lora.dora=True: not with nf4 weights"),
        (f"--config.init_from={workdir}", "holds additions to nf4 weights"),
    ):
        code, _, err = command(train.main, *flags, flag, f"--workdir={tmp_path}/w")
        assert code == 2 and message in err and err.count("error:") == 1
