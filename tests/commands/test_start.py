"""What is wrong with the flags is said before JAX is imported."""

import os
import subprocess
import sys

import pytest

LARGE = (
    "numpy",
    "jax",
    "flax",
    "optax",
    "orbax",
    "grain",
    "tokenizers",
    "tensorflow",
    "tensorstore",
)
CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config()
"""
WRONG = {  # command: arguments, the error
    "train": (["--config={}/c.py", "--config.optim.b1=2"], "optim.b1=2"),
    "train name": (["--config=nope"], "config file nope does not exist; by name there are"),
    "train workdir": (["--config={}/c.py", "--workdir={}/c.py/w"], "is a file, not a folder"),
    "train process": (["--config={}/c.py", "--process_id=1"], "need --coordinator=HOST:PORT"),
    "plan": (["--config={}/c.py", "--config.model.num_layers=0"], "model.num_layers=0"),
    "plan topology": (["--config={}/c.py", "--topology=v9:2x4"], "v9:2x4 is not GENERATION:SHAPE"),
    "plan price": (["--config={}/c.py", "--price=-1"], "--price=-1.0 must be"),
    "benchmark": (["--config={}/c.py", "--steps=0"], "--steps=0"),
    "benchmark profile": (["--config={}/c.py", "--profile={}/c.py"], "is a file, not a folder"),
    "benchmark decode": (
        ["--config={}/c.py", "--decode", "--config.model.kind=encoder_decoder"]
        + ["--config.objective=seq2seq"],
        "--decode times how a decoder continues a text",
    ),
    "prepare": (["--config={}/c.py", "--show=-1"], "--show=-1"),
    "prepare field": (["--config={}/c.py", "--config.data.sourc=x"], "did you mean"),
    "sweep": (["--config={}/c.py", "--grid=batch_size=x"], "batch_size=x"),
    "sweep run": (["--config={}/c.py", "--grid=batch_size=4,-1"], "is not a possible run"),
    "evaluate": (["--workdir={}", "--stride=-1"], "--stride=-1"),
    "evaluate task": (["--workdir={}", "--task=mood:{}/x"], "is unknown: choose sentiment"),
    "evaluate file": (
        ["--workdir={}", "--task=hellaswag"],
        "a file of its rows: --task=hellaswag:",
    ),
    "evaluate near": (["--workdir={}", "--task=helaswag:x"], "did you mean hellaswag?"),
    "evaluate beams": (
        ["--workdir={}", "--num_beams=2", "--task=arc:{}/c.py"],
        "--num_beams writes the targets of objective=seq2seq",
    ),
    "evaluate row": (["--workdir={}", "--task=arc:{}/c.py"], "c.py, line 2"),
    "sample": (["--workdir={}", "--temperature=-1"], "--temperature=-1.0 must be"),
    "sample file": (["--workdir={}", "--prompt_file={}/c.py"], "c.py, line 2"),
    "checkpoint": (["list"], "--workdir=DIR is required"),
    "serve": (["--workdir={}", "--port=70000"], "--port=70000"),
    "convert": (["import", "--from=s3://bucket/x", "--workdir={}/w"], "takes a local folder"),
    "shrink": (["--workdir={}", "--out={}/b", "--method=int9"], "did you mean int8?"),
    "shrink run": (["--workdir={}/none", "--out={}/b", "--method=int8"], "holds no run"),
    "report": ([], "--workdir=DIR is required"),
    "train source": (["--config={}/c.py", "--config.data.source=text:{}/x*"], "no file matches"),
    "benchmark tokenizer": (["--config={}/c.py", "--config.data.tokenizer=x"], "'x' is unknown"),
    "evaluate run": (["--workdir={}/none"], "holds no run"),
    "sample run": (["--workdir={}/none"], "holds no run"),
    "serve run": (["--workdir={}/none"], "holds no run"),
    "checkpoint run": (["list", "--workdir={}/none"], "has no checkpoints"),
    "convert run": (["export", "--workdir={}/none", "--to={}/out"], "holds no run"),
    "convert folder": (["import", "--from={}/none", "--workdir={}/w"], "is not a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags_are_named_without_jax(name, tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("raise ImportError('JAX is not to be imported yet')")
    args, says = WRONG[name]
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            f"jaxgpt.{name.split()[0]}",
            *(arg.replace("{}", str(tmp_path)) for arg in args),
        ],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2 and found.stdout == "", found.stderr
    assert found.stderr.startswith("error: ") and len(found.stderr.splitlines()) == 1
    assert says in found.stderr


def test_a_config_that_is_not_there_is_said_without_large_libraries():
    """0.15 s where nothing else runs; NumPy alone would add half as much."""
    argv = [sys.executable, "-X", "importtime", "-m", "jaxgpt", "train", "--config=nope"]
    found = subprocess.run(argv, capture_output=True, text=True)
    imported = {line.rsplit("|", 1)[1].strip() for line in found.stderr.splitlines() if "|" in line}
    assert found.returncode == 2 and "ml_collections" in imported
    assert not {name for name in imported if name.split(".")[0] in LARGE}
