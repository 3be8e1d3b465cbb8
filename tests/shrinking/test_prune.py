"""Pruned and factorised workdirs through the commands: what they hold, and what training keeps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxgpt import convert, evaluate, sample, shrink, train
from jaxgpt.config import ShrinkConfig
from jaxgpt.config.stored import methods_done, read_config, to_json
from jaxgpt.config.validate import validate
from jaxgpt.inference.trained import open_trained
from jaxgpt.jobs.train import adopt
from jaxgpt.shrinking.calibration import input_moments
from jaxgpt.shrinking.masks import keep_two_of_four
from jaxgpt.shrinking.measure import share_of_zeros
from jaxgpt.shrinking.quantise import as_matrix, projections
from jaxgpt.shrinking.source import Source, with_shrink
from jaxgpt.shrinking.spec import check_order
from jaxgpt.system.errors import BadInput
from tests.conftest import CORPUS, config_flag, tiny_config


@pytest.fixture(scope="module")
def shrunk(trained_run, tmp_path_factory):
    """`shrunk(command, method, *flags, of=workdir) -> (workdir, row)`, each made once."""
    made = {}

    def get(command, method: str, *flags: str, of=trained_run, speed=("--nospeed",)):
        if (key := (method, *flags, of)) not in made:
            out = tmp_path_factory.mktemp("shrunk") / "b"
            given = f"--workdir={of}", f"--out={out}", f"--method={method}", *flags, *speed
            code, text, err = command(shrink.main, *given)
            assert code == 0, err
            made[key] = out, json.loads(text.splitlines()[-1])
        return made[key]

    return get


def kernels_of(workdir) -> dict:
    trained = open_trained(str(workdir), None)
    with jax.set_mesh(trained.mesh):
        return dict(projections(jax.device_get(trained.params())["blocks"]))


def tune(command, tmp_path, source, *fields: str):
    """Fine-tunes a workdir as a user would: its architecture and tokenizer come along."""
    (tmp_path / "corpus.txt").write_text(CORPUS)
    flag = config_flag(
        tmp_path,
        f"init_from={str(source)!r}, model=presets.from_init(), eval_every=0, checkpoint_every=2,"
        f" data=DataConfig(source='text:{tmp_path}/corpus.txt', tokenizer=''),"
        " sample=SampleConfig(max_new_tokens=0), optim=OptimConfig(warmup_steps=1)",
    )
    return command(train.main, flag, f"--workdir={tmp_path}/w", *fields)


@pytest.mark.slow
def test_zeros_outlive_fine_tuning_kill_and_resume(shrunk, command, tmp_path):
    pruned, row = shrunk(command, "prune24", "--calibration=8")
    before = kernels_of(pruned)
    for owner, kernel in before.items():
        for matrix in as_matrix(owner, kernel)[0]:
            np.testing.assert_array_equal(matrix != 0, keep_two_of_four(np.abs(matrix)))
    assert row["bits_per_byte_after"] != row["bits_per_byte_before"]
    for steps in (2, 4):  # the second run resumes
        code, _, err = tune(command, tmp_path, pruned, f"--config.num_steps={steps}")
        assert code == 0, err
    after = kernels_of(tmp_path / "w")
    for owner, kernel in before.items():
        np.testing.assert_array_equal(after[owner] == 0, kernel == 0)
        assert np.mean(after[owner] != kernel) > 0.45
    stored = read_config(epath.Path(tmp_path / "w")).shrink
    assert (stored.zeros, stored.done) == ("keep", "prune24")
    code, _, err = tune(command, tmp_path, pruned, "--config.num_steps=4", "--config.lora.rank=2")
    assert code == 2 and "LoRA's additions would fill the zeros" in err
    out, _ = shrunk(command, "int8", f"--beside={tmp_path}/w", "--calibration=0", of=pruned)
    rows = json.loads((out / "shrink.json").read_text())
    methods = ["original", "prune24", "prune24, trained on", "prune24 int8"]
    assert [row["method"] for row in rows] == methods
    assert f"--config.init_from={pruned}" in rows[2]["command"] and rows[2]["zeros"] == 0.5
    assert rows[2]["bits_per_byte"] != rows[1]["bits_per_byte"]


def test_a_run_goes_on_whose_record_an_older_version_kept(tmp_path):
    """It did not count what training itself had done."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(to_json(tiny_config()))
    config = tiny_config()
    config.shrink = ShrinkConfig(done="distill")
    assert adopt(epath.Path(tmp_path), config) == (tiny_config(), [])


def test_what_training_did_is_done_too():
    config = tiny_config()
    config.objective, config.objectives.distill.teacher = "distill", "a"
    config.shrink = ShrinkConfig(done="layers:0.5", sparsity=0.5)
    assert methods_done(config) == "layers:0.5 distill prune:0.5"
    made = validate(with_shrink(config, "svd:8", ranks="up=8"))
    assert methods_done(made) == made.shrink.done == "layers:0.5 distill prune:0.5 svd:8"
    assert (made.objective, made.shrink.sparsity, made.shrink.zeros) == ("causal_lm", 0, "keep")
    assert methods_done(tiny_config()) == ""
    check_order("distill prune:0.5", "prune", "w")
    with pytest.raises(BadInput, match="heads cannot follow prune"):
        check_order("distill prune:0.5", "heads", "w")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zeros_are_counted_in_every_float(dtype):
    kernel = jnp.asarray([[[0, 1.0, 0, 2], [0, 3, 4, 5]]], dtype)
    params = {"blocks": {"attention": {}, "mlp": {"up": {"kernel": kernel}}}}
    assert share_of_zeros(params) == 3 / 8


def test_pruning_by_magnitude_and_by_inputs_differ(shrunk, command, trained_run):
    whole = kernels_of(trained_run)
    plain, _ = shrunk(command, "prune:0.3", "--calibration=0")
    wanda, _ = shrunk(command, "prune:0.3", "--calibration=8")
    plain, wanda = kernels_of(plain), kernels_of(wanda)
    for owner, kernel in whole.items():
        (matrices, _), (kept, _) = as_matrix(owner, kernel), as_matrix(owner, plain[owner])
        for matrix, left in zip(matrices, kept, strict=True):
            assert np.sum(left == 0) == round(0.3 * left.size)
            assert np.abs(matrix[left == 0]).max() <= np.abs(left[left != 0]).min()
        share = np.mean(as_matrix(owner, wanda[owner])[0] == 0, axis=1)
        np.testing.assert_allclose(share, np.round(0.3 * matrices.shape[1]) / matrices.shape[1])
        assert np.any((wanda[owner] == 0) != (plain[owner] == 0))
        np.testing.assert_array_equal(wanda[owner], kernel * (wanda[owner] != 0))
    trained = open_trained(str(trained_run), None)
    with jax.set_mesh(trained.mesh):
        first, *_ = input_moments(Source(trained), 8)
    for owner, moment in first.items():  # arXiv:2306.11695, eq. 1: |W| times its input's norm
        matrix, kept = as_matrix(owner, whole[owner])[0][0], as_matrix(owner, wanda[owner])[0][0]
        score = np.abs(matrix) * np.sqrt(np.diag(moment))[:, None]
        removed = np.where(kept == 0, score, 0).max(0)
        assert np.all(removed <= np.where(kept == 0, np.inf, score).min(0)), owner


@pytest.mark.slow
def test_heads_layers_and_ranks_go_through_every_command(shrunk, command, tmp_path):
    heads, row = shrunk(command, "heads:0.25", "--calibration=8")
    assert row["bytes_after"] < 0.85 * row["bytes_before"]
    layers, row = shrunk(command, "layers:0.5", "--calibration=8", of=heads)
    ranks, row = shrunk(command, "svd:8", "--calibration=8", of=layers)
    beside = f"--beside={shrunk(command, 'prune24', '--calibration=8')[0]}"
    small, row = shrunk(command, "int8", beside, of=ranks, speed=())
    rows = json.loads((small / "shrink.json").read_text())
    done = ["heads:0.25", "layers:0.5", "svd:8"]
    chain = [" ".join(done[: i + 1]) for i in range(3)]
    assert [r["method"] for r in rows] == ["original", *chain, "prune24", " ".join([*done, "int8"])]
    assert rows[-1]["tokens_per_second_8"] > rows[-1]["tokens_per_second_1"] > 0
    assert rows[-1]["bits_per_byte"] == row["bits_per_byte_after"] and rows[0]["zeros"] == 0
    assert rows[4]["zeros"] == 0.5 and beside in rows[-1]["command"]
    assert rows[-1]["command"] in (small / "shrink.html").read_text()
    assert row["bytes_after"] < 0.4 * row["bytes_before"]
    assert row["bits_per_byte_after"] == pytest.approx(row["bits_per_byte_before"], rel=0.01)
    config = read_config(epath.Path(small))
    assert config.shrink.done == "heads:0.25 layers:0.5 svd:8 int8"
    assert (config.model.num_heads, config.model.mlp_dim, config.model.num_layers) == (3, 96, 1)
    code, out, err = command(
        sample.main, f"--workdir={small}", "--prompt=The ", "--max_new_tokens=9"
    )
    assert code == 0 and out.startswith("The "), err
    code, _, err = tune(command, tmp_path, ranks, "--config.num_steps=3")
    assert code == 0, err
    assert read_config(epath.Path(tmp_path / "w")).shrink.ranks == config.shrink.ranks
    code, out, err = command(evaluate.main, f"--workdir={tmp_path}/w")
    bits = json.loads(out)["bits_per_byte"]  # a few steps of warm-up move it little
    assert code == 0 and bits == pytest.approx(row["bits_per_byte_before"], rel=0.05), err
    code, _, err = command(convert.main, "export", f"--workdir={small}", f"--to={tmp_path}/hf")
    assert code == 0 and "heads     1 of zeros" in err and "checked" in err, err
    exported = json.loads((tmp_path / "hf/config.json").read_text())
    assert (exported["n_head"], exported["n_inner"]) == (4, 96)
    plain, _ = shrunk(command, "svd:8", "--calibration=0")
    code, _, err = command(convert.main, "export", f"--workdir={plain}", f"--to={tmp_path}/hf2")
    assert code == 0 and "checked" in err, err  # dense, and reads back to the same logits


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--method=heads:0.1"], "removes 0 of 4 heads: choose a share from 0.25 to 0.75"),
        (["--method=layers:0.1"], "removes 0 of 2 layers"),
        (["--method=heads:0.5", "--calibration=0"], "set --calibration above 0"),
        (["--method=svd:64", "--calibration=0"], "makes no projection smaller"),
        (["--method=svd:8", "--targets=wte"], "--targets=wte: 'wte' is none of query"),
        (["--method=int8", "--beside=/nowhere"], "/nowhere holds no run: config.json is missing"),
        (["--method=svd:1.5"], "a rank is a whole number"),
    ],
)
def test_what_cannot_be_removed_is_one_line(flags, says, trained_run, command, tmp_path):
    code, out, err = command(shrink.main, f"--workdir={trained_run}", f"--out={tmp_path}/b", *flags)
    assert (code, out) == (2, "") and says in err.splitlines()[-1], err
    assert not (tmp_path / "b").exists()
