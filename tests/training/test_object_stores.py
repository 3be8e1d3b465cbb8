"""Runs whose workdir is in a bucket, on servers of this machine that speak S3 and GCS."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from jaxgpt import checkpoint, convert, evaluate, prepare, report, sample, train
from jaxgpt.metrics import rows as rows_module
from jaxgpt.metrics.rows import ROW, read_rows
from jaxgpt.system import stores
from jaxgpt.system.errors import BadInput
from tests.conftest import CORPUS, PATIENCE, xla_flags
from tests.processes.stores import served

CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=12, batch_size=8, log_every=1, eval_every=6, sample_every=12, checkpoint_every=3,
        keep_checkpoints=2, mesh=MeshConfig(data=8),
        model=ModelConfig(max_seq_len=24, num_layers=1, num_heads=2, embed_dim=32, dropout=0.1,
                          bias=False),
        data=DataConfig(source="text:{folder}/t.txt", tokenizer="sentencepiece:400"),
        optim=OptimConfig(name="sgd", warmup_steps=2), sample=SampleConfig(max_new_tokens=2),
    )
"""


pytestmark = pytest.mark.stores


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request):
    """The URL of a bucket whose server the environment names."""
    with pytest.MonkeyPatch.context() as patch, served(request.param) as (url, env):
        for name, value in env.items():
            patch.setenv(name, value)
        yield url


def rows(workdir) -> list[dict]:
    """The rows so far without what time decides, each of which must stand once."""
    found = read_rows(epath.Path(workdir) / "metrics.jsonl", ROW)  # while training replaces it
    assert len({(row["step"], row["split"]) for row in found}) == len(found)
    return [{k: row[k] for k in ("step", "split", "loss")} for row in found]


def test_a_run_lives_on_an_object_store(bucket, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a URL taken for a path would make a folder
    (tmp_path / "t.txt").write_text(CORPUS)
    (tmp_path / "c.py").write_text(CONFIG.format(folder=tmp_path))

    def run(main, *args):
        code, out, err = command(main, *args)
        assert code == 0, err
        return out, err

    config, workdir, shards = f"--config={tmp_path}/c.py", f"{bucket}/run", f"{bucket}/shards"
    run(train.main, config, f"--workdir={tmp_path}/local")
    counts = json.loads(run(prepare.main, config, f"--out={shards}")[0].splitlines()[-1])
    assert counts["cache"] == shards and counts["tokens"] > 1000
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "of-another-machine"))
    again = [config, f"--config.data.source=shards:{shards}", f"--workdir={workdir}"]

    for step in (3, 9):  # killed when nothing is whole yet, and when a checkpoint is
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "jaxgpt.train", *again],
                env=os.environ | {"XLA_FLAGS": xla_flags(8)},
                stderr=log,
            )
        until = time.monotonic() + 300
        while not (found := rows(workdir)) or found[-1]["step"] < step:
            assert time.monotonic() < until and process.poll() is None, (
                tmp_path / "log"
            ).read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "resume    from checkpoint" in run(train.main, *again)[1]
    assert rows(workdir) == rows(tmp_path / "local")
    assert json.loads(run(checkpoint.main, "verify", f"--workdir={workdir}")[0])["damaged"] == {}

    newest = epath.Path(workdir) / "checkpoints/12"
    (newest / "state/step/0").unlink()
    err = run(train.main, *again)[1]
    assert "damaged   checkpoint 12" in err and "resume    from checkpoint" in err
    assert rows(workdir) == rows(tmp_path / "local")
    aside = epath.Path(workdir) / "checkpoints-damaged/12.0/manifest.json"
    assert aside.exists() and (newest / "state/step/0").exists()

    found = json.loads(run(evaluate.main, f"--workdir={workdir}")[0].splitlines()[-1])
    assert found["loss"] == pytest.approx(rows(workdir)[-1]["loss"], abs=1e-5)
    text, _ = run(sample.main, f"--workdir={workdir}", "--prompt=The", "--max_new_tokens=2")
    assert text.startswith("The")
    out, _ = run(report.main, f"--workdir={workdir}")
    assert out.strip() == f"{workdir}/report.html" and epath.Path(out.strip()).exists()
    assert list((epath.Path(workdir) / "tensorboard").iterdir())
    assert "finished" in run(train.main, *again)[1]
    code, _, err = command(prepare.main, config, "--config.data.tokenizer=byte", f"--out={shards}")
    assert code == 2 and "already holds another prepared corpus" in err
    here = {path.name for path in tmp_path.iterdir()}
    assert here == {"t.txt", "c.py", "local", "cache", "of-another-machine", "log"}


def test_a_workdir_deleted_in_mid_run(bucket, command, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text(CORPUS)
    (tmp_path / "c.py").write_text(CONFIG.format(folder=tmp_path))
    argv, workdir = (f"--config={tmp_path}/c.py", f"--workdir={bucket}/gone"), f"{bucket}/gone"
    write = rows_module.RowFile.write

    def deleting(file, row):
        if row["step"] == 5:
            epath.Path(workdir).rmtree()
        write(file, row)

    monkeypatch.setattr(rows_module.RowFile, "write", deleting)
    code, _, err = command(train.main, *argv)
    assert code == 2 and "everything is in" not in err
    message = f"{workdir}/metrics.jsonl was moved or deleted while the run was writing"
    assert message in err.splitlines()[-1], err
    assert not (epath.Path(workdir) / "metrics.jsonl").exists()
    monkeypatch.undo()


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_store_that_goes_down_in_mid_run(kind, tmp_path):
    """No fault of the input and none of jaxgpt: one line with the URL, exit 1, within minutes."""
    (tmp_path / "t.txt").write_text(CORPUS)
    (tmp_path / "c.py").write_text(CONFIG.format(folder=tmp_path))
    with served(kind) as (url, env):
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jaxgpt.train", f"--config={tmp_path}/c.py"),
                *(f"--workdir={url}/run", "--config.num_steps=100000"),
            ],
            env=os.environ | env | {"XLA_FLAGS": xla_flags(8)},
            stderr=subprocess.PIPE,
            text=True,
        )
        said = []
        for line in process.stderr:
            said.append(line)
            if line.split()[:2] == ["step", "5/100000"]:
                break
    try:
        said += process.communicate(timeout=PATIENCE)[1].splitlines()
    finally:
        process.kill()
    errors = [line for line in said if line.startswith("error: ")]
    assert process.returncode == 1 and len(errors) == 1, said
    assert errors[0].startswith(f"error: the object store of {url}/run does not answer any more (")
    assert errors[0].endswith("run the same command again to resume") and errors[0] == said[-1]
    assert not any("Traceback" in line for line in said)


def test_what_cannot_be_used_is_one_line(bucket, command, tmp_path):
    (tmp_path / "t.txt").write_text(CORPUS)
    (tmp_path / "c.py").write_text(CONFIG.format(folder=tmp_path))
    config = f"--config={tmp_path}/c.py"
    for main, args, message in (
        (train.main, [config, f"--workdir={bucket}-elsewhere/run"], "cannot be written"),
        (train.main, [config, "--workdir=az://bucket/run"], "choose a folder, gs://"),
        (prepare.main, [config, f"--out={bucket}-elsewhere/x"], "cannot be written"),
        (evaluate.main, [f"--workdir={bucket}/nothing"], "holds no run"),
        (train.main, [config, f"--config.data.source=shards:{bucket}/x"], "holds no token shards"),
        (convert.main, ["import", "--from=d", f"--workdir={bucket}/w"], "takes a local folder"),
    ):
        code, _, err = command(main, *args)
        assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err, err


def test_a_store_whose_package_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(stores, "_reached", [])
    with pytest.raises(BadInput, match=r"pip install -e '\.\[s3\]'"):
        stores.check_store("s3://bucket/run")
