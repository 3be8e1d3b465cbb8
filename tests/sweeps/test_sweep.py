"""Sweeps: which runs, in what order, and the same table after a kill."""

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from jaxgpt import sweep
from jaxgpt.config import BadInput, Config
from jaxgpt.sweeps.grid import applied, choices, name_of, parse_grid, rungs
from jaxgpt.sweeps.report import write_results
from tests.conftest import ROOT, wait_until, xla_flags

CONFIG = """
from jaxgpt.config import Config, DataConfig, ModelConfig, OptimConfig, SampleConfig

def get_config():
    return Config(
        num_steps=9, batch_size=8, checkpoint_every=3,
        model=ModelConfig(max_seq_len=16, num_layers=1, num_heads=2, embed_dim=16),
        data=DataConfig(source="text:{corpus}/*.txt", validation_fraction=0.25),
        optim=OptimConfig(warmup_steps=2), sample=SampleConfig(max_new_tokens=0),
    )
"""
GRID = "optim.learning_rate=1e-4,1e-3,1e-2"


def test_grid():
    grid = parse_grid("optim.learning_rate=1e-4,3e-4; batch_size=16,32;model.bias=true,False")
    assert grid["optim.learning_rate"] == [1e-4, 3e-4]
    assert grid["model.bias"] == [True, False]
    every = choices(grid, 0, 0)
    assert len(every) == 8 and every[0] == {
        "optim.learning_rate": 1e-4,
        "batch_size": 16,
        "model.bias": True,
    }
    drawn = choices(grid, 3, 1)
    assert len(drawn) == 3 and all(c in every for c in drawn)
    assert drawn == choices(grid, 3, 1) != choices(grid, 3, 2)
    assert name_of(every[0]) == "learning_rate=0.0001,batch_size=16,bias=True"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--grid=FIELD=VALUE,VALUE;FIELD=... is required"),
        ("seed", "'seed' is not FIELD=VALUE"),
        ("model.layers=1,2", "unknown config field model.layers"),
        ("batch_size=8,many", "batch_size=many is not a valid value: expected int"),
        ("model.bias=1", "not true or false"),
        ("seed=1,1", "seed has a value twice"),
        ("seed=1;seed=2", "names seed twice"),
    ],
)
def test_bad_grids(text, message):
    with pytest.raises(BadInput, match=message):
        parse_grid(text)


def test_an_impossible_combination_is_named():
    with pytest.raises(BadInput, match="num_heads=5 is no possible run: model.embed_dim"):
        applied(Config(), {"model.num_heads": 5})


def test_rungs_of_successive_halving():
    assert rungs(900, 9, 3) == [(100, 9), (300, 3), (900, 1)]
    assert rungs(100, 6, 2) == [(12, 6), (25, 3), (50, 2), (100, 1)]
    assert rungs(100, 6, 0) == [(100, 6)]


def test_results_rank_the_longest_runs_first_and_failures_last(tmp_path):
    rows = [
        {"choice": {"seed": s, "data.source": "a<b"}, "steps": n, "loss": loss}
        for s, n, loss in ((1, 5, 3.0), (2, 10, 2.5), (3, 10, None), (4, 10, 2.0))
    ]
    lines = write_results(tmp_path, rows).splitlines()
    assert [line.split()[2] for line in lines] == ["loss", "4", "2", "3", "1"]
    assert lines[3].split()[1] == "failed"
    picture = ElementTree.parse(tmp_path / "results.svg").getroot()
    assert len([e for e in picture.iter() if e.tag.endswith("circle")]) == 4, "2 runs, 2 fields"
    assert len(json.loads((tmp_path / "results.json").read_text())) == 4


@pytest.fixture
def config_file(corpus, tmp_path):
    file = tmp_path / "run.py"
    file.write_text(CONFIG.format(corpus=corpus))
    return file


def start(config_file, workdir, *args):
    env = os.environ | {
        "XLA_FLAGS": xla_flags(1),
        "JAXGPT_CACHE": str(config_file.parent / "cache"),
    }
    argv = [
        sys.executable,
        "-m",
        "jaxgpt.sweep",
        f"--config={config_file}",
        f"--grid={GRID}",
        f"--workdir={workdir}",
        "--config.seed=5",
        *args,
    ]
    return subprocess.Popen(
        argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_sweep_finishes_with_the_same_table(config_file, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    table, err = (process := start(config_file, whole)).communicate()
    assert process.returncode == 0 and len(table.splitlines()) == 4, err
    process = start(config_file, killed)
    wait_until(lambda: len(list(killed.glob("9-steps/*/metrics.jsonl"))) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "results.json").exists()
    again, err = (process := start(config_file, killed)).communicate()
    assert process.returncode == 0, err
    assert again == table
    best = json.loads((whole / "results.json").read_text())[0]
    assert best["choice"]["optim.learning_rate"] == 1e-2, "too small a rate learns nothing here"
    config = json.loads(next(whole.glob("9-steps/*/config.json")).read_text())
    assert config["seed"] == 5, "overrides reach every run"


def test_halving_and_jobs(command, config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    monkeypatch.chdir(ROOT)
    code, out, err = command(
        sweep.main,
        f"--config={config_file}",
        "--grid=optim.learning_rate=1e-4,1e-2,1e9",
        f"--workdir={tmp_path}/s",
        "--halving=3",
        "--jobs=2",
    )
    assert code == 0, err
    found = [line.split() for line in out.splitlines()[1:]]
    assert [row[0] for row in found] == ["9", "3", "3", "3"]
    assert found[0][2] == "0.01" and found[1][2] == "0.01"


def test_bad_flags(command, config_file):
    argv = (f"--config={config_file}", "--grid=num_steps=1,2")
    for flag, message in (
        ("--jobs=0", "--jobs at least 1"),
        ("--halving=2", "take it out of --grid"),
    ):
        code, out, err = command(sweep.main, *argv, flag)
        assert (code, out) == (2, "") and message in err
