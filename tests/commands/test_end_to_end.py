"""The commands as people run them: train, be killed, resume, evaluate, sample."""

import json
import math
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxgpt import evaluate, sample, train
from jaxgpt.config.schema import IGNORE
from jaxgpt.config.stored import read_config
from jaxgpt.data.pipeline import training_stream
from jaxgpt.data.prepare import prepare
from jaxgpt.inference.trained import open_trained
from jaxgpt.tokenizer import make_tokenizer, save_tokenizer
from jaxgpt.training import verify_resume as verify_module
from tests.conftest import ROOT, wait_until, xla_flags
from tests.processes.forks import Python
from tests.processes.processes import FRESH, Child

CONFIG = """
from jaxgpt.config import Config, DataConfig, ModelConfig, OptimConfig, SampleConfig

def get_config():
    return Config(
        num_steps=12, batch_size=16, grad_accum=2, log_every=1, eval_every=6, checkpoint_every=4,
        keep_checkpoints=2,
        model=ModelConfig(max_seq_len=32, num_layers=2, num_heads=2, embed_dim=32, dropout=0.1),
        data=DataConfig(source="text:{corpus}/*.txt", validation_fraction=0.25),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=2, ema_decay=0.5),
        sample=SampleConfig(max_new_tokens=0),
    )
"""


@pytest.fixture
def config_file(corpus, tmp_path):
    file = tmp_path / "run.py"
    file.write_text(CONFIG.format(corpus=corpus))
    return file


def rows(workdir, split="train") -> list[dict]:
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["split"] == split]


def losses(workdir) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(workdir)}


def start(config_file, workdir, *args, devices=1, fresh=False) -> Child:
    """The real command in a process of its own; one that is not forked if `fresh`."""
    env = os.environ | {
        "XLA_FLAGS": xla_flags(devices),
        "JAXGPT_CACHE": str(config_file.parent / "cache"),
    }
    argv = ["-m", "jaxgpt.train", f"--config={config_file}", f"--workdir={workdir}", *args]
    if fresh:
        return FRESH([sys.executable, *argv], cwd=ROOT, env=env)
    return Python(*argv, cwd=ROOT, env=env)


def test_train_evaluate_sample(command, config_file, tmp_path):
    workdir = tmp_path / "w"
    argv = (f"--config={config_file}", f"--workdir={workdir}", "--config.sample.max_new_tokens=8")
    code, out, err = command(train.main, *argv)
    assert (code, out) == (0, ""), err
    for said in (
        "devices   8 x",
        "parameters",
        "validation tokens",
        "attention xla",
        "compile",
        "tok/s",
        "eta",
        "--- sample at step 12 ---",
        "jaxgpt.sample --workdir",
    ):
        assert said in err
    assert sorted(p.name for p in workdir.iterdir()) == [
        "checkpoints",
        "config.json",
        "end.json",
        "metrics.jsonl",
        "samples.jsonl",
        "tensorboard",
        "tokenizer",
    ]
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [8, 12]
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, 13))
    assert list(found[0]) == [
        "step",
        "split",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "mfu",
        "seconds",
    ]
    assert [row["tokens"] for row in found] == [16 * 32 * k for k in range(1, 13)]
    for row in found:
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(16 * 32)
    assert found[0]["learning_rate"] == pytest.approx(1.5e-3) and found[0]["mfu"] is None
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    validation = rows(workdir, "validation")
    assert [row["step"] for row in validation] == [6, 12]
    assert list(validation[0]) == [
        "step",
        "split",
        "loss",
        "perplexity",
        "bits_per_byte",
        "seconds",
    ]

    code, out, err = command(evaluate.main, f"--workdir={workdir}")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and list(result) == [
        "step",
        "split",
        "loss",
        "perplexity",
        "bits_per_byte",
        "tokens",
        "bytes",
        "seconds",
    ]
    assert (result["step"], result["split"]) == (12, "validation")
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert result[name] == pytest.approx(validation[-1][name], rel=1e-6)
    assert result["loss"] == pytest.approx(plain_loss(workdir), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    bits = result["loss"] * result["tokens"] / math.log(2) / result["bytes"]
    assert result["bits_per_byte"] == pytest.approx(bits)

    file = config_file.parent / "corpus" / "3.txt"  # the held-out document, now by name
    code, out, err = command(evaluate.main, f"--workdir={workdir}", f"--data=text:{file}")
    again = json.loads(out)
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-6)
    assert again["bytes"] == file.stat().st_size == again["tokens"]

    argv = (f"--workdir={workdir}", "--prompt=The ", "--max_new_tokens=10", "--seed=3")
    code, once, _ = command(sample.main, *argv, "--num_samples=2")
    assert code == 0 and once == command(sample.main, *argv, "--num_samples=2")[1]
    first, second = once[:-1].split("\n---\n")
    assert first.startswith("The ") and first != second
    assert command(sample.main, *argv)[1] == first + "\n", "neighbours change nothing"
    greedy = command(sample.main, *argv, "--temperature=0", "--max_new_tokens=5")[1]
    assert greedy == "The " + plain_greedy(workdir, "The ", 5) + "\n"
    code, _, err = command(sample.main, f"--workdir={workdir}", f"--prompt={'x' * 33}")
    assert code == 2 and "more than the model's context of 32" in err
    code, _, err = command(sample.main, f"--workdir={workdir}", "--prompt=abc")
    assert code == 2 and "ask for at most 29 new tokens" in err


def plain_model(workdir):
    """Logits by the whole forward pass: no cache, no evaluation code."""
    trained = open_trained(str(workdir), None)
    with jax.set_mesh(trained.mesh):
        spec, params = trained.spec.for_decoding(), trained.params()

    def logits(tokens):
        with jax.set_mesh(trained.mesh):
            return np.asarray(forward(params, jnp.asarray(tokens)))

    forward = jax.jit(lambda params, tokens: spec.bind(params)(tokens))
    return logits


def plain_loss(workdir) -> float:
    """The contract's loss, window by window in float64, without our evaluation code."""
    text = sorted((workdir.parent / "corpus").iterdir())[-1].read_bytes()
    tokens = [256, *text]
    nats, model = 0.0, plain_model(workdir)
    for start in range(0, len(tokens) - 1, 32):
        window = np.array(tokens[start : start + 33])
        logits = model(window[None, :-1])[0].astype(np.float64)[:, :257]
        lse = np.log(np.exp(logits).sum(-1))
        nats += np.sum(lse - logits[np.arange(len(window) - 1), window[1:]])
    return nats / (len(tokens) - 1)


def plain_greedy(workdir, prompt: str, count: int) -> str:
    ids, model = list(prompt.encode()), plain_model(workdir)
    for _ in range(count):
        ids.append(int(model([ids])[0, -1].argmax()))
    return bytes(i for i in ids[len(prompt) :] if i < 256).decode("utf-8", errors="replace")


def test_kill_9_and_resume_bit_for_bit(config_file, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ("--config.optim.schedule=constant", "--config.sample_every=0")
    process = start(config_file, killed, *flags, "--config.num_steps=100000")
    metrics = killed / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 11, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = max(losses(killed)) + 9  # however late the kill came
    with metrics.open("a") as file:
        file.write('{"step": 99, "spl')  # the half line of an unlucky kill
    process = start(config_file, killed, *flags, f"--config.num_steps={until}")
    _, err = process.communicate()
    assert process.returncode == 0 and "resume    from checkpoint" in err, err
    process = start(config_file, whole, *flags, f"--config.num_steps={until}", fresh=True)
    assert process.wait() == 0, process.communicate()[1]
    assert losses(killed) == losses(whole)
    steps = [r["step"] for r in rows(killed)]
    assert steps == list(range(1, until + 1)), "each step once, in order"
    for split in ("validation", "train"):
        keep = ("step", "loss")
        got, want = ([{k: r[k] for k in keep} for r in rows(w, split)] for w in (killed, whole))
        assert got == want
    assert [r["tokens"] for r in rows(killed)] == [r["tokens"] for r in rows(whole)]
    seconds = [r["seconds"] for r in rows(killed)]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(config_file, tmp_path, number):
    workdir = tmp_path / "w"
    process = start(
        config_file,
        workdir,
        "--config.num_steps=100000",
        "--config.eval_every=0",
        "--config.checkpoint_every=0",
    )
    metrics = workdir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number and "Traceback" not in err, err
    last = rows(workdir)[-1]["step"]
    assert [int(p.name) for p in (workdir / "checkpoints").iterdir()] == [last]


def test_resume_rules(command, config_file, tmp_path):
    workdir = tmp_path / "w"
    argv = (f"--config={config_file}", f"--workdir={workdir}", "--config.num_steps=4")
    assert command(train.main, *argv)[0] == 0
    code, _, err = command(train.main, *argv)
    assert code == 0 and "has all 4 of num_steps=4 steps" in err
    for change, named in (
        ("--config.model.num_layers=3", "model.num_layers: 2 -> 3"),
        ("--config.data.tokenizer=sentencepiece:400", "data.tokenizer: byte -> sentencepiece:400"),
        ("--config.optim.b2=0.9", "optim.b2: 0.95 -> 0.9"),
    ):
        code, out, err = command(train.main, *argv, change)
        assert (code, out) == (2, "") and named in err and err.count("\n") == 1
    code, _, err = command(
        train.main,
        *argv,
        "--config.num_steps=6",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        "--config.grad_accum=1",
        "--config.compute.remat=full",
    )
    assert code == 0 and "num_steps: 4 -> 6" in err, err
    assert sorted(losses(workdir)) == [1, 2, 3, 4, 5, 6]
    assert json.loads((workdir / "config.json").read_text())["num_steps"] == 6
    (config_file.parent / "corpus" / "0.txt").write_text("another text " * 500)
    code, _, err = command(train.main, *argv, "--config.num_steps=8")
    assert code == 2 and "has changed since checkpoint 6" in err


def test_packed_training_counts_real_targets_and_minds_its_tokenizer(
    command, config_file, corpus, tmp_path
):
    workdir = tmp_path / "w"
    for i in range(40):  # documents that leave padding
        (corpus / f"{i}.txt").write_text(f"number {i:03} of forty")
    argv = (
        f"--config={config_file}",
        f"--workdir={workdir}",
        "--config.data.pack=true",
        "--config.num_steps=4",
        "--config.optim.ema_decay=0",
    )
    code, _, err = command(train.main, *argv)
    assert code == 0, err
    config = read_config(epath.Path(workdir))
    stream = training_stream(prepare(config.data).train, config)
    counts = [int((stream.batch(k)["targets"] != IGNORE).sum()) for k in range(4)]
    assert [row["tokens"] for row in rows(workdir)] == np.cumsum(counts).tolist()
    assert min(counts) < 16 * 32
    save_tokenizer(make_tokenizer("byte", [], "<|x|>"), workdir / "tokenizer")
    code, _, err = command(train.main, *argv[:3], "--config.num_steps=6", argv[-1])
    assert code == 2 and "tokenizer is not the tokenizer that" in err


def test_a_second_trainer_is_refused(command, config_file, tmp_path):
    workdir = tmp_path / "w"
    process = start(config_file, workdir, "--config.num_steps=2000")
    wait_until(lambda: (workdir / "metrics.jsonl").exists(), process)
    code, _, err = command(
        train.main, f"--config={config_file}", f"--workdir={workdir}", "--config.num_steps=2000"
    )
    assert code == 2 and f"another process trains in {workdir} now" in err
    process.kill()
    process.wait()


@pytest.mark.slow
def test_verify_resume(command, config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    monkeypatch.chdir(ROOT)
    argv = (f"--config={config_file}", f"--workdir={tmp_path}/w")
    honest, read = verify_module._rows, {}

    def remembered(folder):
        return read.setdefault(folder.name, honest(folder))

    monkeypatch.setattr(verify_module, "_rows", remembered)
    code, out, err = command(train.main, *argv, "--verify_resume=6")
    assert code == 0 and json.loads(out)["identical"] is True, err
    assert "steps 7 to 12 after the kill are identical, bit for bit" in err
    assert not (tmp_path / "w").exists()
    code, _, err = command(train.main, *argv, "--verify_resume=0")
    assert code == 2 and "must be at least 1" in err

    for name in ("_start", "_finish", "_kill_after"):  # the runs are those from before
        monkeypatch.setattr(verify_module, name, lambda *args: None)
    read["killed"][9]["loss"] += 1e-7
    monkeypatch.setattr(verify_module, "_rows", lambda folder: read[folder.name])
    code, _, err = command(train.main, *argv, "--verify_resume=6")
    assert code == 2 and "resume is not exact: step 9 has loss" in err


@pytest.mark.slow
def test_elastic_restore_over_meshes(command, config_file, tmp_path):
    """8 devices, then 4, then 1, then 8: the losses are those of the run that stayed on 8."""
    still = (
        "--config.model.dropout=0",
        "--config.optim.schedule=constant",
        "--config.eval_every=0",
        "--config.checkpoint_every=0",
    )
    argv = (f"--config={config_file}", *still)  # in this process: on 8 devices

    for devices, until in ((8, 11), (4, 22), (1, 33), (8, 44)):
        steps = f"--config.num_steps={until}"
        if devices == 8:
            code, _, err = command(train.main, *argv, steps, f"--workdir={tmp_path}/w")
        else:
            process = start(config_file, tmp_path / "w", *still, steps, devices=devices)
            (_, err), code = process.communicate(), process.returncode
        assert code == 0 and f"{devices} x cpu" in err, err
    code, _, err = command(
        train.main, *argv, "--config.num_steps=44", f"--workdir={tmp_path}/stayed"
    )
    assert code == 0, err
    stayed, moved = losses(tmp_path / "stayed"), losses(tmp_path / "w")
    assert list(moved) == list(stayed) == list(range(1, 45))
    for at in (12, 23, 34):
        assert moved[at] == pytest.approx(stayed[at], abs=1e-5)
        assert moved[at + 10] == pytest.approx(stayed[at + 10], abs=1e-4)
