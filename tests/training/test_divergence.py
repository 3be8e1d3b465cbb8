"""Bad steps change nothing, bad stretches are rolled back and left out, spikes are named."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import checkpoint, evaluate, train
from jaxgpt.objectives import language as objectives
from jaxgpt.training.divergence import Spikes, batch_of
from tests.evaluation.test_watch import no_more_waiting

LENGTH, BATCH = 16, 2
POISON = 1  # a byte that makes its batch's loss infinite or not a number

CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=16, batch_size={batch}, log_every=1, eval_every=0, checkpoint_every=4,
        keep_checkpoints=9, max_bad_steps=2,
        model=ModelConfig(max_seq_len={length}, num_layers=1, num_heads=4, embed_dim=32),
        data=DataConfig(source="text:{folder}/train.txt", shuffle=False,
                        validation_source="text:{folder}/valid.txt"),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=2), mesh=MeshConfig(data=2, tensor=4),
        sample=SampleConfig(max_new_tokens=0),
    )
"""


@pytest.fixture
def run(command, tmp_path, monkeypatch):
    """Trains on text in which the batches of the given numbers (from 0) are poisoned."""
    honest = objectives.hidden_and_figures

    def poisoned(model, micro, key):
        x, figures = honest(model, micro, key)
        return jnp.where(jnp.any(micro["inputs"] == POISON), jnp.nan, x), figures

    monkeypatch.setattr(objectives, "hidden_and_figures", poisoned)
    text = np.random.default_rng(0).choice(list(b"abcdefgh "), 40 * LENGTH * BATCH)

    def train_on(batches, *args, workdir="w"):
        raw = text.copy()
        for number in batches:
            raw[number * LENGTH * BATCH + 3] = POISON
        (tmp_path / "train.txt").write_bytes(bytes(raw.tolist()))
        (tmp_path / "valid.txt").write_text("abcdefgh " * 20)
        (tmp_path / "c.py").write_text(CONFIG.format(batch=BATCH, length=LENGTH, folder=tmp_path))
        code, _, err = command(
            train.main, f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/{workdir}", *args
        )
        rows = (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(r, parse_constant=pytest.fail) for r in rows]
        return code, err, [r["loss"] for r in rows if r["split"] == "train"]

    return train_on


def test_a_bad_step_changes_nothing_and_is_counted(run):
    code, err, losses = run([5])
    assert code == 0 and len(losses) == 16, err
    assert [i for i, loss in enumerate(losses) if loss is None] == [5]
    assert "skipped   step 6 (batch 5): loss or gradient not finite, 1 in a row, 1 in all" in err
    assert all(np.isfinite(loss) for i, loss in enumerate(losses) if i != 5)


@pytest.mark.slow
def test_a_bad_stretch_is_rolled_back_and_left_out(run, command, tmp_path):
    code, err, losses = run([6, 7, 8])
    assert code == 0 and len(losses) == 16, err
    assert "back to checkpoint 4, without batches 6, 7" in err
    # from step 7 on two batches are passed over; the third bad one is skipped alone
    assert [i for i, loss in enumerate(losses) if loss is None] == [6]
    clean_code, _, clean = run([], workdir="clean")
    assert clean_code == 0 and losses[:6] == clean[:6]
    _, out, _ = command(checkpoint.main, "show", f"--workdir={tmp_path}/w", "--step=16")
    assert json.loads(out)["meta"]["skips"] == [[7, 2]]
    assert json.loads(out)["meta"]["rollbacks"] == 1
    code, err, longer = run([6, 7, 8], "--config.num_steps=18")
    whole = run([6, 7, 8], "--config.num_steps=18", workdir="whole")[2]
    assert longer[:16] == losses and [x is None for x in longer] == [x is None for x in whole]


def test_it_gives_up_after_so_many_rollbacks(run, command, tmp_path, monkeypatch):
    code, err, losses = run(range(6, 40), "--config.max_rollbacks=2")
    assert code == 3, err
    assert err.count("back to checkpoint 4") == 2
    last = err.strip().splitlines()[-1]
    assert "after 2 rollbacks: giving up. The last of them took batches 10, 11" in last
    assert "--show=11" in last and "Traceback" not in err
    assert len(losses) == 8 and losses[:6] == [x for x in losses[:6] if x is not None]
    no_more_waiting(monkeypatch)
    code, out, err = command(evaluate.main, f"--workdir={tmp_path}/w", "--watch")
    assert code == 0 and [json.loads(line)["step"] for line in out.splitlines()] == [4], err


def test_without_a_checkpoint_it_goes_back_to_the_start(run):
    code, err, losses = run([0, 1], "--config.num_steps=4")
    assert code == 0 and "back to checkpoint 0, without batches 0, 1" in err
    assert len(losses) == 4 and None not in losses


def test_batches_left_out():
    assert [batch_of(s, []) for s in (1, 2, 3)] == [0, 1, 2]
    assert [batch_of(s, [(2, 3)]) for s in (1, 2, 3)] == [0, 4, 5]
    assert [batch_of(s, [(2, 3), (3, 1)]) for s in (1, 2, 3)] == [0, 4, 6]


@pytest.mark.parametrize("odd", [None, math.nan, math.inf, -math.inf])
def test_spikes_stand_out_and_do_not_become_usual(odd):
    """Losses that are not finite (a float16 overflow, for one) leave the usual as it is."""
    rng, spikes = np.random.default_rng(0), Spikes()
    found = [spikes(float(4 - 0.01 * i + 0.02 * rng.standard_normal())) for i in range(100)]
    assert found == [None] * 100
    if odd is not None:
        assert spikes(odd) is None
    assert spikes(5.0) == pytest.approx(3.1, abs=0.3)
    assert spikes(5.0) is not None and spikes(3.0) is None
