"""Runs on labelled rows, by the commands: what they learn, report, resume and refuse."""

import json
import random
import re

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxgpt import evaluate, prepare, sample, train
from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.denoising.companions import OnCorruptedText
from jaxgpt.inference.requests import BeamSettings
from jaxgpt.inference.trained import open_trained
from jaxgpt.labelled.companions import OnRows
from jaxgpt.objectives.companions import Companions
from jaxgpt.objectives.text import Asked
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path
from tests.conftest import config_flag

WORDS = ["red", "sky", "dog", "cat", "sun", "fir"]
FIELDS = """
    objective="classification", num_steps={steps}, batch_size=16, eval_every=60, log_every=20,
    checkpoint_every=20,
    model=ModelConfig(max_seq_len=24, num_layers=1, num_heads=2, embed_dim=32),
    data=DataConfig(
        source="jsonl:{folder}/rows.jsonl", tokenizer="char", cache_dir="{folder}/cache"
    ),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=5, schedule="constant"),
    objectives=ObjectivesConfig(
        classification=ClassificationConfig(class_weights="balanced", pooling="mean")
    ),
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with rows that are animals' if a dog or a cat is in them, and with a run on them."""
    folder, rng = tmp_path_factory.mktemp("labelled"), random.Random(0)
    rows = [[rng.choice(WORDS) for _ in range(rng.randint(1, 5))] for _ in range(300)]
    lines = [
        json.dumps(
            {"text": " ".join(row), "label": "animal" if {"dog", "cat"} & {*row} else "none"}
        )
        for row in rows
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "new.jsonl").write_text("\n".join(lines[:40]))
    return folder


def flags_of(folder, steps=60) -> str:
    fields = FIELDS.format(folder=folder, steps=steps)
    return config_flag(folder, fields)


def rows_of(workdir, split):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="module")
def trained(folder):
    """The workdir of a run of 60 steps."""
    assert train.main(["train", flags_of(folder), f"--workdir={folder}/whole"]) == 0
    return folder / "whole"


def test_a_rule_is_learnt_and_reported(folder, trained, command):
    (last,) = rows_of(trained, "validation")
    assert last["accuracy"] == 1.0 and last["macro_f1"] == 1.0 and last["loss"] < 0.3
    assert rows_of(trained, "train")[-1]["accuracy"] > 0.9
    assert rows_of(trained, "train")[-1]["tokens"] == 60 * 16
    saved = json.loads((trained / "config.json").read_text())["objectives"]["classification"]
    assert saved["labels"] == "animal,none" and saved["class_weights"].startswith("balanced 0.")

    code, out, _ = command(evaluate.main, f"--workdir={trained}")
    figures = json.loads(out.splitlines()[-1])
    for name in ("loss", "accuracy", "macro_f1", "matthews"):
        assert figures[name] == pytest.approx(last[name], rel=1e-5)
    table = figures["confusion"]
    assert sum(sum(row.values()) for row in table.values()) == figures["tokens"] == 15
    assert table["animal"]["none"] == table["none"]["animal"] == 0
    new = f"--data=jsonl:{folder}/new.jsonl"
    code, out, _ = command(evaluate.main, f"--workdir={trained}", new)
    assert json.loads(out.splitlines()[-1])["tokens"] == 40


def test_unknown_labels_and_strides_are_refused(folder, trained, command):
    (folder / "bad.jsonl").write_text('{"text": "dog", "label": "plant"}')
    bad = f"--data=jsonl:{folder}/bad.jsonl"
    code, _, err = command(evaluate.main, f"--workdir={trained}", bad)
    assert code == 2 and "bad.jsonl, row 1: label 'plant' is unknown; known are animal, none" in err
    code, _, err = command(evaluate.main, f"--workdir={trained}", "--stride=3")
    assert code == 2 and "--stride=3 is for running text" in err


@pytest.mark.parametrize("companions", [Companions, OnCorruptedText, OnRows])
def test_beams_are_refused_by_what_writes_no_targets(trained, companions):
    asked = Asked("", "validation", beams=BeamSettings(2))
    with pytest.raises(BadInput, match="--num_beams writes the targets of objective=seq2seq"):
        companions.measure(open_trained(str(trained), None), asked)


def test_what_prepare_counts(folder, command):
    code, out, _ = command(prepare.main, flags_of(folder))
    counts = json.loads(out.splitlines()[-1])
    assert code == 0 and counts["documents"] == 300 and counts["dropped"] == {}
    assert counts["tokens"] == counts["bytes"]  # of characters, all ASCII
    assert counts["vocab_size"] == len(set(" ".join(WORDS))) + 2
    code, _, err = command(prepare.main, flags_of(folder), "--show=0")
    assert code == 2 and "--show and --against are for running text" in err


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_one_bit_for_bit(folder, trained):
    for steps in (20, 60):
        assert train.main(["train", flags_of(folder, steps), f"--workdir={folder}/parts"]) == 0
    for name in ("loss", "accuracy", "grad_norm"):
        whole, parts = (rows_of(run, "train")[-1][name] for run in (trained, folder / "parts"))
        assert whole == parts
    states = [_leaves(run) for run in (trained, folder / "parts")]
    assert states[0].keys() == states[1].keys() and any("classifier" in n for n in states[0])
    assert all(np.array_equal(a, states[1][n]) for n, a in states[0].items())


def _leaves(workdir) -> dict[str, np.ndarray]:
    """The parameters in the newest checkpoint, by path."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        step = Checkpoints(workdir, read_only=True).latest()
        state = reader.restore(workdir / "checkpoints" / str(step) / "state")
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(state["params"]).items()}


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.data.source=builtin", "has no rows with fields, which the objective needs"),
        ("--config.data.pack=true", "data.pack=True: objective=classification has no such step"),
        ("--config.objectives.classification.labels=animal", "must list two or more different"),
        ("--config.objectives.classification.label_field=x", "line 1 has no field 'x'"),
        ("--config.objective=seq2seq", "needs model.kind=encoder_decoder, not decoder"),
    ],
)
def test_what_cannot_be_learnt_leaves_nothing(folder, command, flag, message):
    code, _, err = command(train.main, flags_of(folder), f"--workdir={folder}/no", flag)
    assert code == 2 and err.splitlines()[-1].startswith("error: ")
    assert re.search(message, err) and not (folder / "no").exists()


def test_a_text_is_given_its_classes_and_one_too_long_is_refused(trained, command):
    code, out, _ = command(sample.main, f"--workdir={trained}", "--prompt=sky dog")
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and [label for label, _ in lines] == ["animal", "none"]
    shares = [float(share) for _, share in lines]
    assert shares[0] > 0.7 and sum(shares) == pytest.approx(1, abs=1e-3)
    code, _, err = command(sample.main, f"--workdir={trained}", f"--prompt={'sun ' * 9}")
    assert code == 2 and "the prompt is longer than the model takes (model.max_seq_len=24)" in err
    code, _, err = command(sample.main, f"--workdir={trained}", "--prompt=sun", "--stream")
    assert code == 2 and "--stream is for models that write text" in err


QUESTION = {
    "question": "sky",
    "context": "dog=12 sky=34",
    "answers": {"text": ["34"], "answer_start": [11]},
}
TASKS = {  # a row, flags, what `sample` is asked, and the figures of `evaluate`
    "seq2seq": (
        {"source": "abc", "target": "cb"},
        ["--config.model.kind=encoder_decoder", "--config.data.special_tokens="],
        ("abc", "cb"),
        ("exact_match", "bits_per_byte"),
    ),
    "token_classification": (
        {"words": ["red", "dog"], "labels": ["O", "A"]},
        ["--config.model.kind=encoder"],
        ("red dog", "red\tO\ndog\tA"),
        ("accuracy", "macro_f1", "matthews", "confusion"),
    ),
    "span_qa": (
        QUESTION,
        ["--config.model.kind=encoder", "--config.model.type_vocab_size=2"],
        ("sky\tdog=12 sky=34", "34"),
        ("exact_match", "f1"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", TASKS)
def test_every_objective_from_its_rows_to_a_prompt(tmp_path, command, objective):
    """One row learnt by heart is enough to go the whole way."""
    row, flags, (prompt, answer), figures = TASKS[objective]
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    source = f"--config.data.source=jsonl:{tmp_path}/rows.jsonl"
    flags = ["--config.data.special_tokens=[CLS],[SEP]", "--config.eval_every=0", *flags]
    flags = [source, f"--config.objective={objective}", "--config.num_steps=40", *flags]
    code, _, err = command(train.main, flags_of(tmp_path), f"--workdir={tmp_path}/w", *flags)
    assert code == 0 and "failed" not in err, err
    code, out, err = command(evaluate.main, f"--workdir={tmp_path}/w")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found.keys() >= {"loss", "perplexity", "tokens", *figures}, err
    score = figures[0] if figures[0] in ("exact_match", "accuracy") else "exact_match"
    assert found[score] == 1.0 and found["loss"] < 0.5
    flags = ["--temperature=0", "--max_new_tokens=10"] * (objective == "seq2seq")
    code, out, err = command(sample.main, f"--workdir={tmp_path}/w", f"--prompt={prompt}", *flags)
    assert code == 0 and out == f"{answer}\n", err
