"""Sampling, evaluating and reporting, as commands, on one small run."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxgpt import evaluate, report, sample
from tests.conftest import CORPUS, xla_flags
from tests.processes.forks import Python
from tests.processes.processes import finish

CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=24, batch_size=8, log_every=1, eval_every=8, checkpoint_every=8,
        keep_checkpoints=9, sample_every=12,
        model=ModelConfig(max_seq_len=64, num_layers=2, num_heads=2, embed_dim=32),
        data=DataConfig(source="0.5*text:{corpus}/a*.txt,0.5*text:{corpus}/b*.txt",
                        validation_fraction=0.3, cache_dir="{corpus}/cache"),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=2),
        sample=SampleConfig(max_new_tokens=8),
    )
"""


# Imports every command, then trains.
TRAIN = """
import importlib, pkgutil
import jaxgpt
for found in pkgutil.iter_modules(jaxgpt.__path__):
    importlib.import_module(f"jaxgpt.{found.name}")
from jaxgpt import train
from jaxgpt.cli.run import run
run(train.main)
"""
# Stands for a package that is installed, and writes down who imports it.
STAND_IN = """
import pathlib, traceback
with open(pathlib.Path(__file__).parent / "imported", "a") as file:
    traceback.print_stack(file=file)
raise ImportError
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run in `run`, and `packages` that were installed meanwhile."""
    folder = tmp_path_factory.mktemp("use")
    for i, name in enumerate(("a0", "a1", "b0", "b1")):
        (folder / f"{name}.txt").write_text(CORPUS[i * 2500 : (i + 1) * 2500])
    (folder / "c.py").write_text(CONFIG.format(corpus=folder))
    for name in ("torch", "tensorflow"):
        (folder / "packages" / name).mkdir(parents=True)
        (folder / "packages" / name / "__init__.py").write_text(STAND_IN)
    path = f"{folder}/packages{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    subprocess.run(
        [sys.executable, "-c", TRAIN, f"--config={folder}/c.py", f"--workdir={folder}/run"],
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture
def workdir(trained):
    return trained / "run"


def test_no_command_imports_torch_or_tensorflow(trained):
    """Where they are installed, that would cost seconds and hundreds of megabytes."""
    for file in (trained / "packages").glob("*/imported"):
        raise AssertionError(file.read_text())


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_every_checkpoint_and_its_row(command, workdir):
    code, out, err = command(evaluate.main, f"--workdir={workdir}", "--all_steps")
    assert code == 0, err
    found = {row["step"]: row for row in map(json.loads, out.splitlines())}
    logged = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    trained = {row["step"]: row["loss"] for row in logged if row["split"] == "validation"}
    assert list(found) == [8, 16, 24]
    stored = (workdir / "evaluations.jsonl").read_text().splitlines()[-3:]
    assert [json.loads(line) for line in stored] == [
        r | {"on": "validation"} for r in found.values()
    ]
    for step, row in found.items():
        assert row["loss"] == pytest.approx(trained[step], abs=1e-6)
        nats = sum(part["loss"] * part["tokens"] for part in row["sources"].values())
        assert len(row["sources"]) == 2
        assert nats / row["tokens"] == pytest.approx(row["loss"], abs=1e-9)
        assert sum(part["tokens"] for part in row["sources"].values()) == row["tokens"]


def test_a_stride_counts_each_token_once_with_more_context(command, workdir):
    plain = last_json(command(evaluate.main, f"--workdir={workdir}")[1])
    same = last_json(command(evaluate.main, f"--workdir={workdir}", "--stride=64")[1])
    more = last_json(command(evaluate.main, f"--workdir={workdir}", "--stride=8")[1])
    assert same["loss"] == plain["loss"]
    assert more["tokens"] == plain["tokens"]
    assert 1e-6 < abs(more["loss"] - plain["loss"]) < 0.05, "other context, hardly other numbers"
    for flags, message in (
        (["--stride=65"], "--stride=65 must be from 1 to model.max_seq_len=64"),
        (["--stride=-1"], "must be at least 0"),
        (["--watch", "--step=8"], "do not go together"),
        (["--watch_every=0", "--watch"], "must be above 0"),
    ):
        code, _, err = command(evaluate.main, f"--workdir={workdir}", *flags)
        assert code == 2 and message in err and err.count("\n") == 1, err


def test_watch_sees_checkpoints_as_they_come(workdir, tmp_path):
    config, other = workdir.parent / "c.py", tmp_path / "run"
    env = os.environ | {"XLA_FLAGS": xla_flags(1)}
    argv = [f"--workdir={other}", "--watch", "--watch_every=0.1"]
    watcher = Python("-m", "jaxgpt.evaluate", *argv, env=env)
    assert "waiting   for the first checkpoint" in watcher.stderr.readline()
    argv = [f"--config={config}", f"--workdir={other}", "--config.sample.max_new_tokens=0"]
    assert finish([Python("-m", "jaxgpt.train", *argv, env=env)])[0] == [0]
    out, err = watcher.communicate()
    assert watcher.returncode == 0, err
    assert [json.loads(line)["step"] for line in out.splitlines()] == [8, 16, 24]


def write_rows(file, rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


ARC = {
    "question": "Which is it?",
    "choices": {"text": ["x", "yz"], "label": ["A", "B"]},
    "answerKey": "B",
}
AI2 = {
    "question": {
        "stem": "Q",
        "choices": [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}],
    },
    "answerKey": "1",
}
SWAG = {
    "ctx_a": "A man [title]",
    "ctx_b": "sits",
    "activity_label": "Sitting",
    "endings": ["down", "up."],
    "label": "1",
}


@pytest.mark.parametrize(
    ("task", "rows", "choices"),
    [
        (
            "arc",
            [ARC, AI2],
            [
                ("Question: Which is it?\nAnswer:", " x", " yz"),
                ("Question: Q\nAnswer:", " x", " y"),
            ],
        ),
        ("hellaswag", [SWAG], [("Sitting: A man. Sits", " down", " up.")]),
    ],
)
def test_multiple_choice_by_likelihood(command, workdir, tmp_path, task, rows, choices):
    """The answer must be that of summing `evaluate`'s own token losses by hand."""
    file = write_rows(tmp_path / "t.jsonl", rows)
    code, out, err = command(evaluate.main, f"--workdir={workdir}", f"--task={task}:{file}")
    assert code == 0, err
    found = last_json(out)
    right = {"arc": [1, 0], "hellaswag": [1]}[task]
    hits = normed = 0
    for (prompt, *ends), answer in zip(choices, right, strict=True):
        scores = np.array([-total_nats(command, workdir, tmp_path, prompt, end) for end in ends])
        hits += scores.argmax() == answer
        normed += (scores / [len(end) - 1 for end in ends]).argmax() == answer
    assert found["accuracy"] == hits / len(rows) and found["accuracy_norm"] == normed / len(rows)


def total_nats(command, workdir, folder, prompt: str, end: str) -> float:
    """Nats of `end` after `prompt`, as the difference of two whole documents' losses."""
    totals = []
    for text in (prompt, prompt + end):
        (folder / "one.txt").write_text(text)
        row = last_json(
            command(evaluate.main, f"--workdir={workdir}", f"--data=text:{folder}/one.txt")[1]
        )
        totals.append(row["loss"] * row["tokens"])
    return totals[1] - totals[0]


def test_lambada_is_the_last_words_likelihood(command, workdir, tmp_path):
    rows = [{"text": "the licence of this work"}, {"text": "in no event shall"}]
    code, out, err = command(
        evaluate.main,
        f"--workdir={workdir}",
        f"--task=lambada:{write_rows(tmp_path / 't.jsonl', rows)}",
    )
    assert code == 0, err
    nats = [total_nats(command, workdir, tmp_path, *cut(row["text"])) for row in rows]
    assert last_json(out)["perplexity"] == pytest.approx(math.exp(sum(nats) / 2), rel=1e-4)
    assert last_json(out)["accuracy"] in (0, 0.5, 1)


def cut(text: str) -> tuple[str, str]:
    prompt, word = text.rsplit(" ", 1)
    return prompt, f" {word}"


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("arc", {"question": "q"}, "is no row of arc"),
        ("arc", ARC | {"answerKey": "C"}, "is no row of arc"),
        ("hellaswag", SWAG | {"label": 2}, "choice 2 is not there"),
        ("lambada", {"text": "one"}, "is no row of lambada"),
    ],
)
def test_rows_of_another_kind_are_named(command, workdir, tmp_path, task, row, message):
    file = write_rows(tmp_path / "t.jsonl", [row])
    code, _, err = command(evaluate.main, f"--workdir={workdir}", f"--task={task}:{file}")
    assert code == 2 and message in err and f"{file}, line 1" in err


def test_a_file_of_prompts(command, workdir, tmp_path):
    rows = [{"prompt": f"row {i}", "id": i, "seed": i} for i in range(10)]
    rows[3] |= {"max_new_tokens": 3, "temperature": 0}
    file = write_rows(tmp_path / "p.jsonl", rows)
    code, out, err = command(
        sample.main, f"--workdir={workdir}", f"--prompt_file={file}", "--max_new_tokens=12"
    )
    assert code == 0, err
    found = list(map(json.loads, out.splitlines()))
    assert [row["id"] for row in found] == list(range(10))
    assert all(len(row["tokens"]) == len(row["logprobs"]) == 12 for row in found if row["id"] != 3)
    assert len(found[3]["tokens"]) == 3 and found[3]["finish_reason"] == "length"
    code, out, _ = command(
        sample.main, f"--workdir={workdir}", "--prompt=row 7", "--seed=7", "--max_new_tokens=12"
    )
    assert out == f"row 7{found[7]['text']}\n", "the same as alone"
    for bad, message in (
        ([{"text": "x"}], "line 1 has no field 'prompt'"),
        ([{"prompt": "x" * 60}], "ask for at most 4 new tokens"),
        (["x"], "line 1 is not an object"),
        ([{"prompt": "\ud800"}], "line 1: prompt holds half a surrogate pair"),
        ([{"prompt": "x", "temperature": 10**400}], "line 1: temperature=inf must be at least 0"),
        ([{"prompt": "x", "seed": 2**32}], "line 1: seed=4294967296 must be from 0"),
        ([{"prompt": "x", "stop": "y" * 10**6}], "a string of 1000000 characters"),
    ):
        file = write_rows(tmp_path / "bad.jsonl", bad)
        code, out, err = command(
            sample.main, f"--workdir={workdir}", f"--prompt_file={file}", "--max_new_tokens=12"
        )
        assert (code, out) == (2, "") and message in err


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--seed=4294967296", "--seed=4294967296 must be from 0 to 4294967295"),
        ("--seed=-1", "--seed=-1 must be at least 0"),
        ("--seed=5e9", "--seed"),
        (f"--seed={'9' * 400}", "must be from 0"),
        (f"--stop={'x' * 2000}", "--stop holds a string of 2000 characters; at most 1000"),
        ("--prompt=\udcff", "is not UTF-8"),
        ("--temperature=nan", "--temperature=nan must be"),
        ("--num_samples=1000000000", "--num_samples=1000000000 must be from 1"),
    ],
)
def test_flags_of_sample_out_of_range(command, workdir, flag, says):
    code, out, err = command(sample.main, f"--workdir={workdir}", flag)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err


def test_weights_that_are_no_numbers_are_refused(command, workdir, monkeypatch):
    import jax

    from jaxgpt import serve
    from jaxgpt.inference.trained import Trained

    params = Trained.params
    broken = lambda self: jax.tree.map(lambda p: p * np.float32("nan"), params(self))  # noqa: E731
    monkeypatch.setattr(Trained, "params", broken)
    for main, flag in ((sample.main, "--prompt=x"), (serve.main, "--port=0")):
        code, out, err = command(main, f"--workdir={workdir}", flag)
        assert (code, out) == (2, "") and "holds weights that are not finite (" in err, err


def test_streaming_stops_beams_and_several(command, workdir):
    base = (f"--workdir={workdir}", "--prompt=the ", "--max_new_tokens=20", "--seed=2")
    whole = command(sample.main, *base, "--num_samples=2")[1]
    assert whole.count("\n---\n") == 1
    assert command(sample.main, *base, "--num_samples=2", "--stream")[1] == whole
    text = whole.split("\n---\n")[0].removeprefix("the ")
    stop = text[5:7]
    code, out, err = command(sample.main, *base, f"--stop={stop}")
    assert out == f"the {text[: text.find(stop)]}\n", err
    code, greedy, _ = command(sample.main, *base, "--temperature=0")
    assert command(sample.main, *base, "--num_beams=1")[1] == greedy
    code, out, err = command(sample.main, *base, "--num_beams=4", "--num_samples=2")
    assert code == 0 and out.count("the ") >= 2, err
    code, one, err = command(sample.main, *base, "--num_beams=4", "--length_penalty=0")
    assert code == 0 and out.startswith(one.removesuffix("\n")), "all texts are of one length"
    for flags, message in (
        (["--num_beams=2", "--num_samples=3"], "are more than --num_beams=2"),
        (["--num_beams=2", "--stream"], "--num_beams goes with --prompt alone"),
        (["--length_penalty=2"], "--length_penalty goes with --num_beams"),
        (["--num_beams=2", "--length_penalty=nan"], "--length_penalty=nan must be from -10 to 10"),
        (["--interactive"], "--prompt and --interactive do not go together"),
        (["--stop="], "--stop must not be empty"),
        (["--suffix=x"], "token <|fim_prefix|>, which the tokenizer lacks: train with --config.ob"),
        (["--suffix=x", "--chat"], "--suffix and --chat do not go together"),
    ):
        code, _, err = command(sample.main, *base, *flags)
        assert code == 2 and message in err


def test_text_beyond_the_context_is_refused_or_slides(command, workdir):
    base = (f"--workdir={workdir}", "--prompt=the ", "--max_new_tokens=150", "--seed=2")
    code, out, err = command(sample.main, *base)
    assert (code, out) == (2, "") and "new tokens, or use --beyond_context=slide" in err
    code, out, err = command(sample.main, *base[:1], f"--prompt={'x' * 65}")
    assert code == 2 and "shorten it, or use --beyond_context=slide" in err
    slide = "--beyond_context=slide"
    code, out, err = command(sample.main, *base, slide, "--num_samples=2")
    assert code == 0 and len(out.split("\n---\n")[0]) > 100, err
    assert "context of 64 tokens goes on from its last 32, read anew" in err
    code, streamed, _ = command(sample.main, *base, slide, "--num_samples=2", "--stream")
    assert streamed == out
    short = command(sample.main, *base, "--max_new_tokens=60")[1]
    assert out.startswith(short.rstrip("\n\ufffd")), "up to the first cut the same"
    code, _, err = command(sample.main, *base, slide, "--num_beams=2")
    assert code == 2 and "--num_beams and --beyond_context=slide do not go together" in err


def test_interactive_continues_line_by_line(workdir, tmp_path):
    lines = tmp_path / "lines"
    lines.write_bytes(f"one\n{'x' * 60}\ntwo\n".encode() + b"\xff\xfe\nthree\n")
    argv = [f"--workdir={workdir}", "--interactive", "--max_new_tokens=10", "--temperature=0"]
    with lines.open() as stdin:
        (code,), (out,), (err,) = finish([Python("-m", "jaxgpt.sample", *argv, stdin=stdin)])
    assert code == 0, err
    assert out.startswith("one") and "\ntwo" in out and "\nthree" in out
    assert "error: a prompt of 60 tokens" in err, "said, and the next line is taken"
    assert "error: the line is not UTF-8" in err


def test_a_report_stands_alone(command, workdir, tmp_path):
    code, out, err = command(report.main, f"--workdir={workdir}")
    assert code == 0 and out == f"{workdir}/report.html\n", err
    text = (workdir / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text.replace(
        "http://www.w3.org/2000/svg", ""
    )
    (data,) = re.findall(r"const RUNS = (.*);\n", text)
    (found,) = json.loads(data)
    assert found["train"]["step"] == list(range(1, 25))
    assert found["validation"]["step"] == [8, 16, 24]
    sources = found["data"]["sources"].values()
    assert [part["weight"] for part in sources] == [0.5, 0.5]
    assert sum(part["train tokens"] for part in sources) == found["data"]["train tokens"]
    assert found["facts"]["step"] == 24 and found["facts"]["best_loss"] < 6
    assert found["data"]["train tokens"] > 1000 and found["environment"]["jax"]
    assert found["config"]["optim.learning_rate"] == 3e-3 and len(found["samples"]) == 2
    code, out, _ = command(
        report.main, f"--workdir={workdir}", f"--workdir={workdir}", f"--out={tmp_path}/both.html"
    )
    assert (
        code == 0
        and len(
            json.loads(re.findall(r"const RUNS = (.*);\n", (tmp_path / "both.html").read_text())[0])
        )
        == 2
    )
    for args, message in (
        ((), "--workdir=DIR is required"),
        ((f"--workdir={tmp_path}",), "no run"),
    ):
        code, _, err = command(report.main, *args)
        assert code == 2 and message in err


def test_a_sample_cannot_end_the_reports_script(command, workdir, tmp_path):
    import shutil

    shutil.copytree(workdir, tmp_path / "w")
    with (tmp_path / "w/samples.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 24, "prompt": "</script><script>alert(1)", "text": "<b>"}) + "\n"
        )
    assert command(report.main, f"--workdir={tmp_path}/w")[0] == 0
    text = (tmp_path / "w/report.html").read_text()
    assert text.count("</script>") == 1 and "alert(1)" in text
