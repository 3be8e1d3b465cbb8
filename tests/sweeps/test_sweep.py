"""Sweeps: which runs, in what order, and the same table after a kill."""

import dataclasses
import json
import os
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags
from etils import epath

from jaxgpt import sweep
from jaxgpt.cli.flags import config_of, define_config_flag, parse
from jaxgpt.config import Config
from jaxgpt.config.stored import to_json
from jaxgpt.sweeps import runner
from jaxgpt.sweeps.grid import apply_choice, choices, name_of, parse_grid, rungs
from jaxgpt.sweeps.report import write_results
from jaxgpt.sweeps.runner import Children
from jaxgpt.system.errors import BadInput
from jaxgpt.training.end import record_end
from tests.conftest import ROOT, wait_until, xla_flags
from tests.processes.forks import Python

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
    with pytest.raises(BadInput, match="num_heads=5 is not a possible run: model.embed_dim"):
        apply_choice(Config(), {"model.num_heads": 5})


def test_rungs_of_successive_halving():
    assert rungs(900, 9, 3) == [(100, 9), (300, 3), (900, 1)]
    assert rungs(100, 6, 2) == [(12, 6), (25, 3), (50, 2), (100, 1)]
    assert rungs(100, 6, 0) == [(100, 6)]


def test_results_rank_the_longest_runs_first_and_failures_last(tmp_path):
    rows = [
        {"choice": {"seed": s, "data.source": "a<b"}, "rung": n // 10, "steps": n, "loss": loss}
        for s, n, loss in ((1, 5, 3.0), (2, 10, 2.5), (3, 10, None), (4, 10, 2.0))
    ]
    lines = write_results(tmp_path, rows).splitlines()
    assert [line.split()[2] for line in lines] == ["loss", "4", "2", "3", "1"]
    assert lines[3].split()[1] == "failed"
    picture = ElementTree.parse(tmp_path / "results.svg").getroot()
    dots = [e.attrib for e in picture.iter() if e.tag.endswith("circle")]
    assert len(dots) == 6, "3 runs that did not fail, 2 fields: the first rung's too"
    assert sorted(float(dot["r"]) for dot in dots) == [4, 4, 4, 4, 6, 6], "one best a panel"
    assert len({dot["fill"] for dot in dots}) == 2, "a colour for each rung"
    words = [e.text for e in picture.iter() if e.tag.endswith("text")]
    assert "10 steps" in words and "5 steps" in words
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
    argv = [f"--config={config_file}", f"--grid={GRID}", f"--workdir={workdir}", "--config.seed=5"]
    return Python("-m", "jaxgpt.sweep", *argv, *args, cwd=ROOT, env=env)


@pytest.mark.slow
def test_a_killed_sweep_finishes_with_the_same_table(config_file, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    table, err = (process := start(config_file, whole)).communicate()
    assert process.returncode == 0 and len(table.splitlines()) == 4, err
    for count, number, code in ((1, signal.SIGTERM, 143), (2, signal.SIGKILL, -9)):
        process = start(config_file, killed)
        wait_until(lambda n=count: len(list(killed.glob("9-steps/*/metrics.jsonl"))) >= n, process)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == code and not (killed / "results.json").exists()
        if number == signal.SIGTERM:  # its run saved and ended with it, and no other began
            assert len(list(killed.glob("9-steps/*/checkpoints/*"))) > 0
            assert len(list(killed.glob("9-steps/*.log"))) == 1
    again, err = (process := start(config_file, killed)).communicate()
    assert process.returncode == 0, err
    assert again == table
    best = json.loads((whole / "results.json").read_text())[0]
    assert best["choice"]["optim.learning_rate"] == 1e-2, "too small a rate learns nothing here"
    config = json.loads(next(whole.glob("9-steps/*/config.json")).read_text())
    assert config["seed"] == 5, "overrides reach every run"


def test_halving_and_jobs(command, config_file, tmp_path, monkeypatch):
    """Its runs are forked, not started by `sweeps.child`: a killed sweep's are, above."""

    def forked(argv, env, stdout, stderr, process_group):
        assert argv[1:3] == ["-m", "jaxgpt.sweeps.child"]
        return Python("-m", *argv[4:], env=env, stdout=stdout, stderr=stderr)

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=forked))
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


def trainer(argv: list[str], log: str, device) -> int:
    """Stands in for the training process: reads its command line as `train` does and leaves the
    files that `train` leaves. The loss is the learning rate; the seed is how it fails."""
    values = flags.FlagValues()
    define_config_flag(values, ["train", *argv])
    flags.DEFINE_string("workdir", None, "folder", flag_values=values)
    config = config_of(parse(values, ["train", *argv], "doc"))
    if config.seed:
        return config.seed
    steps = 7 if config.num_epochs else config.num_steps
    rate, workdir = config.optim.learning_rate, Path(values.workdir)
    losses = [(steps // 2, rate / 2), (steps, rate)] if config.early_stop else [(steps, rate)]
    rows = [{"step": s, "split": "validation", "loss": x, "seconds": 0.0} for s, x in losses]
    workdir.mkdir(exist_ok=True)
    stored = dataclasses.replace(config, num_steps=steps)
    stored.model.vocab_size = 257
    (workdir / "config.json").write_text(to_json(stored))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record_end(epath.Path(workdir), steps, "early_stop" if config.early_stop else "num_steps")
    return 0


@pytest.fixture
def sweeps(command, config_file, tmp_path, monkeypatch):
    """Runs a sweep whose runs are `trainer`s: `(grid, *flags) -> (code, rows, err, started)`."""
    started = []

    def train(self, argv, log, device):
        started.append(argv)
        return trainer(argv, log, device)

    monkeypatch.setattr(Children, "train", train)

    def call(grid, *args):
        started.clear()
        argv = (f"--config={config_file}", f"--grid={grid}", f"--workdir={tmp_path}/s")
        code, _, err = command(sweep.main, *argv, *args)
        file = tmp_path / "s/results.json"
        return code, json.loads(file.read_text()) if file.exists() else [], err, len(started)

    return call


def test_a_loss_is_taken_again_only_from_a_run_of_the_same_config(sweeps):
    code, rows, err, started = sweeps(GRID)
    assert (code, started) == (0, 3), err
    lines = [line for line in err.splitlines() if "best so far" in line]
    assert [line.partition(", eta")[0][-17:] for line in lines[:2]] == [
        "| 1 done, 2 to go",
        "| 2 done, 1 to go",
    ]
    assert len(lines) == 3 and "to go" not in lines[2]
    assert [row["loss"] for row in rows] == [1e-4, 1e-3, 1e-2]
    assert sweeps(GRID)[3] == 0, "all three have ended"
    assert sweeps(GRID, "--config.eval_every=3")[3] == 3, "what may change on resume: train says"
    code, _, err, started = sweeps(GRID, "--config.data.shuffle=false")
    assert (code, started) == (2, 0) and "data.shuffle: True -> False" in err
    assert "choose another --workdir" in err


@pytest.mark.parametrize(
    "args",
    [
        ["--config.data.shuffle=false", "--config.optim.warmup_steps=7"],
        ["--noconfig.data.shuffle", "-config.optim.warmup_steps=7"],
        ["--config.data.shuffle=0", "--config.optim.warmup_steps", "7"],
    ],
)
def test_overrides_reach_the_runs_however_they_are_spelled(sweeps, tmp_path, args):
    code, _, err, _ = sweeps("seed=0", *args, "--config.sample.prompt= 'a,b' \"c\"")
    assert code == 0, err
    config = json.loads((tmp_path / "s/9-steps/seed=0/config.json").read_text())
    assert config["data"]["shuffle"] is False and config["optim"]["warmup_steps"] == 7
    assert config["sample"]["prompt"] == " 'a,b' \"c\""


def test_runs_that_count_epochs_or_stop_early_have_not_failed(sweeps):
    code, rows, err, _ = sweeps(GRID, "--config.num_epochs=2")
    assert code == 0 and [row["steps"] for row in rows] == [7, 7, 7], err
    assert sweeps(GRID, "--config.num_epochs=2")[3] == 0, "they have ended"


def test_a_run_that_stopped_early_counts_by_its_best_validation(sweeps):
    code, rows, err, _ = sweeps(GRID, "--config.early_stop=2")
    assert code == 0 and rows[0]["loss"] == 1e-4 / 2 and rows[0]["steps"] == 4, err
    assert sweeps(GRID, "--config.early_stop=2")[3] == 0


def test_sizes_in_a_grid_are_those_of_its_own_runs(sweeps, tmp_path):
    """num_kv_heads, head_dim and mlp_dim follow what the grid changes."""
    code, _, err, started = sweeps("model.num_heads=2,12", "--config.model.embed_dim=128")
    assert (code, started) == (2, 0)
    assert "model.embed_dim=128 is not divisible by model.num_heads=12" in err
    code, rows, err, _ = sweeps("model.num_heads=2,4;model.embed_dim=16,32")
    assert code == 0 and len(rows) == 4, err
    name = "9-steps/num_heads=4,embed_dim=32/config.json"
    model = json.loads((tmp_path / "s" / name).read_text())["model"]
    assert (model["num_kv_heads"], model["head_dim"], model["mlp_dim"]) == (4, 8, 128)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("batch_size=8,0", "batch_size=0 is not a possible run: batch_size=0 must be at least 1"),
        ("seed=0,99999999999999999999", "is not a possible run: seed=99999999999999999999"),
        ("optim.learning_rate=1e-3,nan", "learning_rate=nan must be above 0"),
        ("data.tokenizer=byte,words", "data.tokenizer='words' is unknown"),
        ("data.source=builtin,text:nowhere/*", "no file matches nowhere/*"),
        ("data.clean=unicode,spelling", "spelling"),
        ("model.vocab_size=300,20", "smaller than the tokenizer's 257"),
        ("optim.freeze=tokens,(", "is not a list of patterns"),
        ("optim.lr_multipliers=tokens=2,x", "'x' is not PATTERN=FACTOR"),
        ("init_from=nowhere", "is neither a workdir with checkpoints nor"),
    ],
)
def test_every_value_is_checked_before_the_first_run(sweeps, tmp_path, grid, message):
    code, _, err, started = sweeps(grid)
    assert (code, started) == (2, 0) and message in err, err
    assert not (tmp_path / "s").exists()


def test_a_failed_run_shows_in_the_exit_code(sweeps):
    for seeds, code, failed in (("0,3", 3, 1), ("0,3,1", 1, 2), ("0,3,1,143", 1, 3)):
        found, rows, err, _ = sweeps(f"seed={seeds}")
        assert found == code and f"error: {failed} of {failed + 1} runs failed" in err, err
        assert [row["loss"] for row in rows].count(None) == failed, (
            "the table is there all the same"
        )


def test_another_grids_results_are_not_overwritten(sweeps):
    _, before, _, _ = sweeps(GRID)
    code, after, err, started = sweeps("batch_size=8,16")
    assert (code, started) == (2, 0) and after == before
    assert "has another grid's results, for example learning_rate=0.0001" in err
    code, after, err, started = sweeps(GRID + ",1e-1")
    assert (code, started, len(after)) == (0, 1, 4), "more of the same grid"


def test_names_of_folders_do_not_collide():
    one, two = ({"data.source": f"text:{path}"} for path in ("a/b", "a_b"))
    assert name_of(one) != name_of(two)
    assert len(name_of({"data.source": "x" * 5000})) < 200


def test_bad_flags(command, config_file):
    argv = (f"--config={config_file}", "--grid=num_steps=1,2")
    for flag, message in (
        ("--jobs=0", "--jobs=0 must be at least 1"),
        ("--jobs=2000000000", "at most 1024"),
        ("--halving=2", "take num_steps and num_epochs out of --grid"),
    ):
        code, out, err = command(sweep.main, *argv, flag)
        assert (code, out) == (2, "") and message in err
