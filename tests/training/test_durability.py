"""Damaged checkpoints are named, set aside, and the newest whole one is used."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxgpt import checkpoint, evaluate, train
from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.system.errors import BadInput
from jaxgpt.training.setup import make_training
from tests.conftest import CORPUS, mesh_of, tiny_config
from tests.processes.forks import Python
from tests.processes.processes import finish

CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=12, batch_size=8, log_every=1, eval_every=4, checkpoint_every=4,
        keep_checkpoints=9,
        model=ModelConfig(max_seq_len=24, num_layers=2, num_heads=2, embed_dim=32, dropout=0.1),
        data=DataConfig(source="text:{folder}/corpus/*.txt", validation_fraction=0.25,
                        cache_dir="{folder}/cache"),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=2),
        sample=SampleConfig(max_new_tokens=0),
    )
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a config, its corpus, and a finished run of 12 steps in `w`."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "corpus").mkdir()
    for i in range(4):
        (folder / "corpus" / f"{i}.txt").write_text(CORPUS[i * 2800 : (i + 1) * 2800])
    (folder / "c.py").write_text(CONFIG.format(folder=folder))
    argv = [f"--config={folder}/c.py", f"--workdir={folder}/w"]
    codes, _, errors = finish([Python("-m", "jaxgpt.train", *argv)])
    assert codes == [0], errors
    return folder


@pytest.fixture
def trained(command, finished, tmp_path):
    """A copy of the finished run and the function that runs it again, with other flags."""
    workdir = tmp_path / "w"
    shutil.copytree(finished / "w", workdir)

    def again(*args):
        return command(train.main, f"--config={finished}/c.py", f"--workdir={workdir}", *args)

    return workdir, again


def metrics(workdir) -> list[dict]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: row[k] for k in ("step", "split", "loss")} for row in rows]


def largest(folder):
    files = [p for p in (folder / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def truncated(folder):
    file = largest(folder)
    file.write_bytes(file.read_bytes()[:-100])
    return "bytes, not"


def flipped(folder):
    file = largest(folder)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    return "has another checksum"


def without_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


def without_shard(folder):
    largest(folder).unlink()
    return "is missing"


def garbled_manifest(folder):
    (folder / "manifest.json").write_text("{")
    return "manifest.json: it is not valid JSON"


@pytest.mark.parametrize(
    "fault", [truncated, flipped, without_manifest, without_shard, garbled_manifest]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on(command, trained, fault):
    workdir, again = trained
    before = metrics(workdir)
    message = fault(workdir / "checkpoints/12")
    code, out, err = command(checkpoint.main, "verify", f"--workdir={workdir}")
    assert code == 2 and message in err.splitlines()[-1]
    assert json.loads(out) == {"whole": [4, 8], "damaged": {"12": json.loads(out)["damaged"]["12"]}}
    code, out, err = command(evaluate.main, f"--workdir={workdir}")
    assert code == 0 and json.loads(out)["step"] == 8 and "trying the one before" in err
    code, _, err = command(evaluate.main, f"--workdir={workdir}", "--step=12")
    assert code == 2 and "checkpoint 12" in err and "is damaged" in err
    code, _, err = again()
    assert code == 0, err
    assert "damaged   checkpoint 12: " in err and "resume    from checkpoint 8" in err
    assert [p.name for p in (workdir / "checkpoints-damaged").iterdir()] == ["12.0"]
    assert metrics(workdir) == before, "the same numbers, each step once"
    code, out, err = command(checkpoint.main, "verify", f"--workdir={workdir}")
    assert code == 0 and json.loads(out) == {"whole": [4, 8, 12], "damaged": {}}, err


def test_nothing_whole_starts_anew(trained):
    workdir, again = trained
    before = metrics(workdir)
    for step in (4, 8, 12):
        flipped(workdir / f"checkpoints/{step}")
    code, _, err = again()
    assert code == 0 and err.count("damaged   checkpoint") == 3
    assert metrics(workdir) == before


def test_list_and_show(command, trained):
    workdir, again = trained
    code, out, err = command(checkpoint.main, "list", f"--workdir={workdir}")
    rows = json.loads(out)
    assert code == 0 and [row["step"] for row in rows] == [4, 8, 12]
    losses = {r["step"]: r["loss"] for r in metrics(workdir) if r["split"] == "validation"}
    for row in rows:
        assert row["tokens"] == row["step"] * 8 * 24 and row["loss"] == losses[row["step"]]
        assert row["damage"] == "" and row["bytes"] > 100_000
    assert err.count("| whole") == 3
    code, out, err = command(checkpoint.main, "show", f"--workdir={workdir}", "--step=8")
    found = json.loads(out)
    assert found["arrays"]["params/tokens"] == [[384, 32], "float32"]
    assert found["meta"]["seed"] == 0 and found["meta"]["config"]["num_steps"] == 12
    assert set(found["meta"]["versions"]) >= {"jax", "flax", "orbax-checkpoint"}
    for args, message in (
        (("list",), "--workdir=DIR is required"),
        (("look", f"--workdir={workdir}"), "say what to do"),
        (("show", f"--workdir={workdir}", "--step=5"), "holds no checkpoint 5, only"),
        (("list", f"--workdir={workdir}/nowhere"), "has no checkpoints"),
    ):
        code, _, err = command(checkpoint.main, *args)
        assert code == 2 and message in err
    flipped(workdir / "checkpoints/12")  # and fewer steps than the one before it has
    code, _, err = again("--config.num_steps=6")
    assert code == 0 and "damaged   checkpoint 12: " in err, err
    assert "finished" in err and "has 8 steps, more than num_steps=6" in err
    for num_steps, nearest in ((5, 4), (7, 8)):
        code, _, err = again(f"--config.num_steps={num_steps}")
        assert f"the nearest checkpoint is {nearest} (--step={nearest})" in err and code == 0


def test_retention_keeps_the_newest_the_best_and_every_so_many(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=10)
    losses = {2: 5.0, 4: 1.0, 6: 3.0, 8: None, 10: 4.0, 12: 2.0, 14: None, 16: 2.0}
    for step, loss in losses.items():
        checkpoints.save(step, {"a": jax.numpy.ones(3)}, {"tokens": 0}, loss)
    checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).steps() == [4, 10, 14, 16]


def test_another_model_is_named_by_its_first_array(tmp_path):
    with jax.set_mesh(mesh := mesh_of(tiny_config())):
        small = make_training(tiny_config(), mesh)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, jax.jit(small.init)(), {"tokens": 0})
        wide = make_training(tiny_config(mlp_dim=64), mesh)
        with pytest.raises(
            BadInput, match=r"array params/blocks/mlp/.* has shape .*, this run's is"
        ):
            checkpoints.restore(1, wide.abstract_state())
        bare = make_training(tiny_config(bias=False), mesh)
        with pytest.raises(BadInput, match="has an array .*bias, which this run does not have"):
            checkpoints.restore(1, bare.abstract_state())
        narrow = make_training(tiny_config(compute={"param_dtype": "bfloat16"}), mesh)
        state, _ = checkpoints.restore(1, narrow.abstract_state())
        assert state.params["tokens"].dtype == jax.numpy.bfloat16, "another dtype is fine"
        checkpoints.close()
        assert np.isfinite(np.asarray(state.params["tokens"], np.float32)).all()


def test_a_disk_that_fills_during_a_save_is_one_clear_line(trained, monkeypatch):
    workdir, again = trained
    import jaxgpt.checkpointing.checkpoints as module

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_manifest", full)
    code, _, err = again("--config.num_steps=20")
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: checkpoint 16 cannot be written to"), err
    assert "No space left on device" in last and "the newest whole one is 12" in last
    monkeypatch.undo()
    code, _, err = again("--config.num_steps=20")
    assert code == 0 and "resume    from checkpoint 12" in err
