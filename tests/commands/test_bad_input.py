"""Each kind of bad input: exit code 2, one line that says what and what to do, nothing left."""

import os
import subprocess
import sys

import pytest

from jaxgpt import evaluate, sample, train
from tests.conftest import ROOT, xla_flags

CONFIG = """
from jaxgpt.config import Config, DataConfig, ModelConfig
def get_config():
    return Config(model=ModelConfig(max_seq_len=16, num_layers=1, num_heads=2, embed_dim=16),
                  data=DataConfig(source="text:{folder}/good.txt"))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "good.txt").write_text("some text\n" * 50)
    (tmp_path / "short.txt").write_text("some\ntext\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    return tmp_path


CASES = {
    "unknown field": (["model.layers=3"], "unknown config field --config.model.layers"),
    "wrong type": (
        ["num_steps=many"],
        "--config.num_steps=many is not a valid value: expected int",
    ),
    "heads": (["model.num_heads=3"], "model.embed_dim=16 is not divisible by model.num_heads=3"),
    "mesh and batch": (["batch_size=9"], "make batch_size a multiple of 8"),
    "accumulation": (["grad_accum=5"], "batch_size=8 is not divisible by grad_accum=5"),
    "missing file": (
        ["data.source=text:nowhere/*"],
        "no file matches nowhere/*; name yours with --config.data.source=text:FILE",
    ),
    "empty corpus": (["data.source=text:{}/empty.txt"], "is empty"),
    "not UTF-8": (["data.source=text:{}/latin.txt"], "latin.txt is not UTF-8 (byte 3"),
    "broken jsonl": (
        ["data.source=jsonl:{}/broken.jsonl"],
        "broken.jsonl, line 2 is not valid JSON",
    ),
    "no text": (["data.source=jsonl:{}/other.jsonl"], "other.jsonl, line 1 has no text field"),
    "source": (["data.source=ftp:x"], "data source 'ftp:x' is unknown"),
    "tokenizer": (["data.tokenizer=words"], "data.tokenizer='words' is unknown"),
    "short": (["data.source=text:{}/short.txt"], "shorter than one chunk"),
    "vocabulary": (["data.tokenizer=sentencepiece:9000"], "Vocabulary size too high"),
    "vocab_size": (["model.vocab_size=9"], "smaller than the tokenizer's 257"),
    "kernel": (
        ["compute.attention=cudnn", "compute.dtype=bfloat16"],
        "the devices are cpu, not gpu",
    ),
    "prompt": (["sample.prompt=a prompt beyond sixteen"], "sample.prompt has 23 tokens"),
}


def assert_one_error_line(code: int, out: str, err: str, message: str):
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (2, "", 1), err
    assert message in errors[0] and errors[0] == err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("name", CASES)
def test_train_refuses(command, folder, name):
    overrides, message = CASES[name]
    workdir = folder / "w"
    argv = [f"--config.{o.format(folder)}" for o in overrides]
    result = command(train.main, f"--config={folder}/c.py", f"--workdir={workdir}", *argv)
    assert_one_error_line(*result, message)
    assert not workdir.exists(), "nothing half-written"
    left = list((folder / "cache").rglob("*.tmp")) if (folder / "cache").exists() else []
    assert not left


def test_no_config_and_no_workdir(command, folder):
    assert_one_error_line(*command(train.main, "--config=no.py"), "no.py does not exist")
    assert_one_error_line(*command(train.main), "--config=FILE is required")
    for main in (evaluate.main, sample.main):
        assert_one_error_line(*command(main), "--workdir=DIR is required")
        assert_one_error_line(*command(main, f"--workdir={folder}"), "holds no run")
    assert_one_error_line(
        *command(sample.main, f"--workdir={folder}", "--top_k=-1"), "--top_k=-1 must be at least 0"
    )


def test_shakespeare_names_the_text_that_it_needs(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = command(train.main, "--config=shakespeare")
    says = "no file matches shakespeare.txt; name yours with --config.data.source=text:FILE"
    assert_one_error_line(*found, says)
    assert not (folder / "runs").exists()


def test_workdir_below_a_file(command, folder):
    argv = (f"--config={folder}/c.py", f"--workdir={folder}/good.txt/w")
    assert_one_error_line(*command(train.main, *argv), "good.txt is a file, not a folder")


def test_help_in_a_process_of_its_own():
    """The contract's exit codes as a shell sees them."""
    argv = [sys.executable, "-m", "jaxgpt.train"]
    helped = subprocess.run([*argv, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (
        helped.returncode == 0 and "--workdir" in helped.stdout and "Train a GPT" in helped.stdout
    )
    env = os.environ | {"XLA_FLAGS": xla_flags(1)}
    bad = subprocess.run([*argv, "--confg=x"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert_one_error_line(bad.returncode, bad.stdout, bad.stderr, "confg")
