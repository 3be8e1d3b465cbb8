"""What a report says of a run, from rows written by hand."""

import json

import pytest

from jaxgpt.config.stored import to_json
from jaxgpt.evaluation.results import add_result
from jaxgpt.metrics.rows import Reporter
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
        **dict(best_loss=4.0, best_step=4, best_bits_per_byte=12.0, last_loss=4.5, last_step=8),
        "not_finite": 1,
        "tokens_per_second": 4.0,  # the middle one of 1, 50, 3, 4, 5
    }
    steps = [1, 2, 3, 4, 5]
    assert found["train"]["step"] == steps and found["train"]["mfu"] == [None] * 5
    assert found["train"]["loss"] == [*(9.0 - s / 1000 for s in steps[:4]), None]
    assert found["train"]["learning_rate"] == [s / 7 for s in steps]
    assert found["validation"] == {
        **dict(step=[2, 4, 6, 8], tokens=[20, 40, 50, 50], seconds=[4.0, 8.0, 12.0, 16.0]),
        **dict(loss=[5.0, 4.0, None, 4.5], bits_per_byte=[15.0, 12.0, None, 13.5]),
    }
    assert found["bits_per_nat"] == 3.0 and found["config"]["num_steps"] == 10
    assert found["config"]["optim.learning_rate"] == 1e-2


def test_shares_of_few_experts_are_curves_of_many_their_extremes(tmp_path):
    def rows(experts: int):
        return [
            train(
                step,
                **{f"expert_share/{i}": float((i * 7 + step) % experts) for i in range(experts)},
            )
            for step in (1, 2)
        ]

    few = gather(written(tmp_path / "few", rows(3)))["expert_shares"]
    assert few == {"expert 0": [1.0, 2.0], "expert 1": [2.0, 0.0], "expert 2": [0.0, 1.0]}
    many = gather(written(tmp_path / "many", rows(18)))["expert_shares"]
    named = zip(("fullest expert", "median expert", "emptiest expert"), (17.0, 9.0, 0.0))
    assert many == {name: [value] * 2 for name, value in named}
    assert gather(written(tmp_path / "dense", [train(1)]))["expert_shares"] == {}


def test_long_runs_are_thinned_but_not_of_spikes(tmp_path):
    rows = [train(step) for step in range(1, 40 * MAX_POINTS + 2)]
    rows[7777] |= {"loss": 99.0, "grad_norm": 2e3}
    rows[5555] |= {"grad_norm": 1e3}
    rows[3333] |= {"loss": None}
    samples = [{"step": step, "prompt": "", "text": str(step)} for step in range(200)]
    found = gather(written(tmp_path / "w", rows, samples))
    columns = found["train"]
    points = dict(zip(columns["step"], zip(columns["loss"], columns["grad_norm"])))
    assert MAX_POINTS / 4 < len(points) <= MAX_POINTS and max(points) == 40 * MAX_POINTS + 1
    assert points[7778] == (99.0, 2e3) and points[5556][1] == 1e3 and points[3334][0] is None
    gaps = [b - a for a, b in zip(columns["step"], columns["step"][1:])]
    assert 0 < min(gaps) and max(gaps) <= 2 * 40 * 4, "spread over the whole run, in order"
    assert len(found["samples"]) <= MAX_SAMPLES and found["samples"][-1]["step"] == 199


def test_evaluations_and_what_is_saved_with_checkpoints(tmp_path):
    folder = written(tmp_path / "w", [train(1)])
    assert gather(folder)["evaluations"] == [] and gather(folder)["data"] == {}
    for step, loss, stride in ((2, 3.0, 0), (1, 4.0, 0), (2, 2.5, 64), (2, 3.5, 0)):
        add_result(folder, {"step": step, "split": "s", "loss": loss}, "s", stride)
    with open(f"{folder}/evaluations.jsonl", "a") as file:
        file.write('{"step": 2}\n{"on')  # neither counts
    found = gather(folder)["evaluations"]
    kept = [(row["step"], row.get("stride"), row["loss"]) for row in found]
    assert kept == [(1, None, 4.0), (2, None, 3.5), (2, 64, 2.5)], "the later of two of a kind"
    for step in (1, 2):
        meta = tmp_path / f"w/checkpoints/{step}/meta"
        meta.mkdir(parents=True)
        (meta / "metadata").write_text(json.dumps({"tokens": 1, "data": {"vocabulary": step}}))
    assert gather(folder)["data"] == {"vocabulary": 2}
    (meta / "metadata").write_text("{")
    assert gather(folder)["data"] == {"vocabulary": 1}, "the newest that can be read"


def test_a_run_that_goes_back_forgets_evaluations_after_that(tmp_path):
    folder = written(tmp_path / "w", [train(1), train(2)])
    for step in (1, 2):
        add_result(folder, {"step": step, "split": "s"}, "s")
    Reporter(folder, 1, True).close()
    assert [row["step"] for row in gather(folder)["evaluations"]] == [1]


def test_an_evaluation_is_kept_by_no_workdir_that_cannot_be_written(tmp_path, capsys):
    add_result(f"{tmp_path}/not-there", {"step": 1, "split": "s"}, "s")
    said = capsys.readouterr().err
    assert "evaluations.jsonl cannot be written" in said and said.count("\n") == 1


def test_half_a_row_is_left_out_and_no_row_is_said(tmp_path):
    folder = written(tmp_path / "w", [train(1), train(2)])
    with open(tmp_path / "w/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "split"')
    assert gather(folder)["facts"]["step"] == 2
    with pytest.raises(BadInput, match="holds no rows yet"):
        gather(written(tmp_path / "new", []))
