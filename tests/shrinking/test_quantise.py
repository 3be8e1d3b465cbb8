"""Quantised workdirs: what they hold, what they compute, and that the commands take them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

from jaxgpt import checkpoint, convert, evaluate, sample, shrink, train
from jaxgpt.config import MeshConfig, ShrinkConfig
from jaxgpt.config.stored import read_config
from jaxgpt.inference.decode import Decoder, generate
from jaxgpt.inference.requests import Sampling
from jaxgpt.inference.trained import open_trained
from jaxgpt.interchange.load import as_floats
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import make_eval_step
from jaxgpt.parameters.flops import count_parameters
from jaxgpt.shrinking.quantise import nearest
from jaxgpt.system.trees import leaves_by_path
from tests.conftest import config_flag, mesh_of, random_batch, tiny_config

KEPT = "--keep=head,positions,up", "--calibration=0"
KEYS = ["method", "bytes_before", "bytes_after", "bits_per_byte_before", "bits_per_byte_after"]


@pytest.fixture(scope="module")
def shrunk(trained_run, tmp_path_factory):
    """`shrunk(command, method, *flags) -> (workdir, the printed row)`, each made once."""
    made = {}

    def get(command, method: str, *flags: str):
        if (method, *flags) not in made:
            out = tmp_path_factory.mktemp("shrunk") / "b"
            given = f"--workdir={trained_run}", f"--out={out}", f"--method={method}", "--nospeed"
            code, text, err = command(shrink.main, *given, *flags)
            assert code == 0, err
            made[method, *flags] = out, json.loads(text.splitlines()[-1])
        return made[method, *flags]

    return get


def params_of(workdir) -> dict:
    trained = open_trained(str(workdir), None)
    with jax.set_mesh(trained.mesh):
        return jax.device_get(trained.params())


def floats_of(workdir) -> dict:
    trained = open_trained(str(workdir), None)
    with jax.set_mesh(trained.mesh):
        return leaves_by_path(as_floats(trained.config, trained.params())[1])


@pytest.mark.parametrize("method, most", [("int8", 0.30), ("int4", 0.19)])
def test_the_row_says_what_is_there(method, most, shrunk, trained_run, command):
    out, row = shrunk(command, method)
    assert list(row) == KEYS and row["method"] == method
    for workdir, when in ((trained_run, "before"), (out, "after")):
        code, text, _ = command(evaluate.main, f"--workdir={workdir}")
        assert json.loads(text.splitlines()[-1])["bits_per_byte"] == row[f"bits_per_byte_{when}"]
        assert sum(a.nbytes for a in jax.tree.leaves(params_of(workdir))) == row[f"bytes_{when}"]
    assert row["bytes_after"] < most * row["bytes_before"]
    assert abs(row["bits_per_byte_after"] / row["bits_per_byte_before"] - 1) < 0.01
    assert read_config(epath.Path(out)).shrink.done == method
    assert read_config(epath.Path(trained_run)).shrink == ShrinkConfig()


def test_each_matrix_is_nearly_what_it_was_and_the_rest_exactly(shrunk, trained_run, command):
    out, _ = shrunk(command, "nf4", "--group=64", "--calibration=0")
    stored, before, after = leaves_by_path(params_of(out)), floats_of(trained_run), floats_of(out)
    assert before.keys() == after.keys()
    quantised = {path for path in before if f"{path}/values" in stored}
    assert {path.split("/")[-2] for path in quantised if "/" in path} == {
        *("query", "key", "value", "out", "up", "down", "positions")
    }
    for path in before:
        error = np.linalg.norm(after[path] - before[path]) / np.linalg.norm(before[path])
        # a uniform error within steps of a 16th of the range of 64 normal weights: some 9%
        assert 1e-3 < error < 0.12 if path in quantised else error == 0, (path, error)


def test_what_is_kept_stays_float(shrunk, trained_run, command):
    out, _ = shrunk(command, "int8", *KEPT)
    stored, before = leaves_by_path(params_of(out)), leaves_by_path(params_of(trained_run))
    kept = {path for path in before if path in stored and path.endswith(("kernel", "tokens"))}
    assert kept == {"tokens", "positions/kernel", "blocks/mlp/up/kernel"}
    assert all(np.array_equal(stored[path], before[path]) for path in kept)


def quantised_model(shrink: ShrinkConfig, model: dict, shape=(1, 1, 1)):
    """(config, params), from random ones: odd enough that groups do not fill the inputs."""
    config = tiny_config(shape, **({"position": "learned", "vocab_size": 200} | model))
    with jax.set_mesh(mesh_of(tiny_config())):
        params = jax.device_get(jax.jit(ModelSpec(config, "xla").init)(jax.random.key(1)))
    return dataclasses.replace(config, shrink=shrink), nearest(params, shrink, "head")


def nats_of(config, params):
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        like = jax.eval_shape(spec.init, jax.random.key(0))
        params = jax.tree.map(lambda a, w: jax.device_put(a, w.sharding.spec), params, like)
        split = spec.rules(None, "batch", "seq")
        batch = {n: jax.device_put(a, split) for n, a in random_batch(config).items()}
        return np.asarray(make_eval_step(spec)(params, batch))


STORED = [
    (ShrinkConfig("int8"), {}),
    (ShrinkConfig("int4", 32), dict(tie_embeddings=False)),
    (ShrinkConfig("nf4", 12), dict(activation="swiglu", num_kv_heads=2)),
]


@pytest.mark.parametrize("shrink, model", STORED)
def test_on_a_mesh_a_quantised_model_is_the_model_of_its_weights(shrink, model):
    config, params = quantised_model(shrink, model, (2, 2, 2))
    with jax.set_mesh(mesh_of(tiny_config())):
        bare, floats = as_floats(dataclasses.replace(config, mesh=MeshConfig(1, 1, 1)), params)
    assert count_parameters(params, config.model) == count_parameters(floats, config.model)
    np.testing.assert_allclose(nats_of(config, params), nats_of(bare, floats), atol=1e-5)


def test_a_quantised_model_writes_what_the_model_of_its_weights_writes():
    config, params = quantised_model(*STORED[1])
    with jax.set_mesh(mesh_of(config)):
        bare, floats = as_floats(config, params)
        models = (ModelSpec(config, "xla"), params), (ModelSpec(bare, "xla"), floats)
        decoders = [Decoder.of(*model, 200) for model in models]
        prompts, greedy = [np.arange(5), np.arange(3)], Sampling(temperature=0.0)
        (tokens, logprobs), (want, wanted) = (generate(d, prompts, 12, greedy) for d in decoders)
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_allclose(logprobs, wanted, atol=1e-5)


def test_other_commands_take_a_quantised_workdir(shrunk, trained_run, command, tmp_path):
    out, _ = shrunk(command, "int4")
    asked = "--prompt=The ", "--temperature=0", "--max_new_tokens=9"
    code, text, err = command(sample.main, f"--workdir={out}", *asked)
    assert code == 0 and text.startswith("The "), err
    code, text, err = command(checkpoint.main, "show", f"--workdir={out}")
    arrays = json.loads(text.splitlines()[-1])["arrays"]
    assert arrays["params/blocks/mlp/up/kernel/values"] == [[2, 16, 128], "uint8"], err
    code, text, err = command(checkpoint.main, "verify", f"--workdir={out}")
    assert code == 0, err
    code, text, err = command(convert.main, "export", f"--workdir={out}", f"--to={tmp_path}/hf")
    assert code == 0 and "checked" in err, err  # reads back to the same logits
    code, _, err = command(
        convert.main, "import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/w"
    )
    assert code == 0, err
    imported, ours = floats_of(tmp_path / "w"), floats_of(out)
    known = read_config(epath.Path(out)).model.vocab_size
    np.testing.assert_allclose(imported["tokens"][:known], ours["tokens"][:known], atol=1e-7)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--method=int9"], "--method=int9 is unknown; did you mean int8?"),
        (["--method=int8:3"], "int8 takes no argument"),
        (["--method=svd"], "write svd:NUMBER, the rank of each projection"),
        (["--method=heads:1.5"], "must be above 0 and below 1"),
        (["--method=int4", "--group=48"], "--group=48 must be one of 0, 32, 64, 128"),
        (["--method=int4", "--keep=wte"], "--keep=wte: 'wte' is none of query, key"),
        (["--method=int4", "--calibration=-1"], "--calibration=-1 must be at least 0"),
        (["--method=int8", "--step=7"], "no checkpoint 7"),
        (["--method=int8", "--out="], "--out=... is required"),
        (["--method=int8", "--out=gs://b/w"], "shrink writes a local folder"),
        (["--method=int8", "--data=text:/nowhere/*"], "/nowhere/*"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, says, trained_run, command, tmp_path):
    code, out, err = command(shrink.main, f"--workdir={trained_run}", f"--out={tmp_path}/b", *flags)
    assert (code, out, err.splitlines()[-1].startswith("error: ")) == (2, "", True)
    assert says in err and not any(p for p in tmp_path.iterdir() if p.name != "cache")


def test_nothing_is_overwritten_and_the_order_is_kept(shrunk, trained_run, command, tmp_path):
    out, _ = shrunk(command, "int8", *KEPT)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    code, _, err = command(shrink.main, f"--workdir={trained_run}", f"--out={out}", "--method=int8")
    assert code == 2 and f"{out} exists already; choose another --out" in err
    code, _, err = command(shrink.main, f"--workdir={out}", f"--out={tmp_path}/b", "--method=int4")
    assert code == 2 and "was shrunk already (int8); int4 cannot follow int8" in err
    code, _, err = command(
        shrink.main, f"--workdir={out}", f"--out={tmp_path}/b", "--method=heads:0.5"
    )
    assert code == 2 and "heads cannot follow int8" in err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_quantised_weights_are_not_trained(shrunk, command, tmp_path):
    out, _ = shrunk(command, "int8", *KEPT)
    flag, workdir = config_flag(tmp_path), f"--workdir={tmp_path}/w"
    code, _, err = command(train.main, flag, workdir, "--config.shrink.weights=int8")
    assert code == 2 and "shrink.weights='int8': such weights are not trained" in err
    model = [
        f"--config.{k}={v}"
        for k, v in {
            "model.num_layers": 2,
            "model.embed_dim": 32,
            "model.num_heads": 4,
            "model.max_seq_len": 24,
            "data.tokenizer": f"hf:{out}",
            "init_from": out,
        }.items()
    ]
    code, _, err = command(train.main, flag, workdir, *model)
    assert code == 2 and "holds int8 weights, which are not trained: set lora.rank" in err
    assert not (tmp_path / "w" / "checkpoints").exists()


def test_text_shorter_than_a_window_is_refused(trained_run, command, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    given = "--method=int4", f"--data=text:{tmp_path}/short.txt"
    code, _, err = command(shrink.main, f"--workdir={trained_run}", f"--out={tmp_path}/b", *given)
    assert code == 2 and "shorter than one chunk" in err and not (tmp_path / "b").exists()
