"""What a report says of a run, from rows written by hand."""

import json

import pytest

from jaxgpt.config.stored import to_json
from jaxgpt.reports.gather import MAX_POINTS, MAX_SAMPLES, gather
from jaxgpt.system.errors import BadInput
from tests.conftest import tiny_config


def written(folder, rows, samples=()):
    folder.mkdir()
    (folder / "config.json").write_text(to_json(tiny_config()))
    for name, found in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(folder)


def train(step, **more):
    row = dict(step=step, split="train", loss=9.0 - step / 1000, learning_rate=step / 7, mfu=None)
    row |= dict(grad_norm=2.0, tokens=10 * step, tokens_per_second=float(step), seconds=2.0 * step)
    return row | more


def validation(step, loss):
    bits = loss and 3 * loss
    row = dict(step=step, split="validation", loss=loss, perplexity=1.0, bits_per_byte=bits)
    return row | dict(seconds=2.0 * step)


def test_facts_by_hand(tmp_path):
    rows = [train(1), train(2, tokens_per_second=50.0), validation(2, 5.0), train(3), train(4)]
    rows += [validation(4, 4.0), train(5, loss=None), validation(6, None), validation(8, 4.5)]
    samples = [{"step": 4, "prompt": "a", "text": "b"}]
    found = gather(written(tmp_path / "w", rows, samples))
    assert found["name"] == "w" and found["samples"] == samples
    assert found["facts"] == {
        **dict(step=8, num_steps=10, seconds=16.0, tokens=50),
        **dict(best_loss=4.0, best_step=4, best_bits_per_byte=12.0),
        "tokens_per_second": 4.0,  # the middle one of 1, 50, 3, 4, 5
    }
    assert found["curves"]["loss"] == [[s, 9.0 - s / 1000] for s in (1, 2, 3, 4)]
    assert found["curves"]["validation"] == [[2, 5.0], [4, 4.0], [8, 4.5]]
    assert found["curves"]["learning_rate"] == [[s, s / 7] for s in (1, 2, 3, 4, 5)]
    assert found["curves"]["mfu"] == [] and found["config"]["num_steps"] == 10
    assert found["config"]["optim.learning_rate"] == 1e-2


def test_long_runs_are_thinned_to_the_last_point(tmp_path):
    rows = [train(step) for step in range(1, 4 * MAX_POINTS + 2)]
    samples = [{"step": step, "prompt": "", "text": str(step)} for step in range(200)]
    found = gather(written(tmp_path / "w", rows, samples))
    steps = [step for step, _ in found["curves"]["loss"]]
    assert MAX_POINTS / 2 < len(steps) <= MAX_POINTS and steps[-1] == 4 * MAX_POINTS + 1
    assert len({b - a for a, b in zip(steps, steps[1:], strict=False)}) == 1, "evenly spread"
    assert len(found["samples"]) <= MAX_SAMPLES and found["samples"][-1]["step"] == 199


def test_half_a_row_is_left_out_and_no_row_is_said(tmp_path):
    folder = written(tmp_path / "w", [train(1), train(2)])
    with open(tmp_path / "w/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "split"')
    assert gather(folder)["facts"]["step"] == 2
    with pytest.raises(BadInput, match="holds no rows yet"):
        gather(written(tmp_path / "new", []))
