"""The best checkpoint stays, however often the workdir is opened, and is found by name."""

import dataclasses
import json
from unittest.mock import Mock

import jax
import pytest
from etils import epath

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.data.show import Example
from jaxgpt.jobs.train import conclude
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer.base import ByteTokenizer
from jaxgpt.training.loop import History, Loop
from tests.conftest import tiny_config

STATE = {"a": jax.numpy.ones(3)}


def save(workdir, losses: dict, keep=2, old=False) -> list[int]:
    """Opens the checkpoints, saves one for each loss, and returns which are there then."""
    checkpoints = Checkpoints(workdir, keep)
    checkpoints.newest_whole()
    for step, loss in losses.items():
        meta = {"tokens": step} | ({"validations": list(losses.items())} if old else {})
        checkpoints.save(step, STATE, meta, None if old else loss)
    checkpoints.close()
    return Checkpoints(workdir, read_only=True).steps()


def flip(file) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("old", [False, True], ids=["as now", "of an earlier version"])
def test_the_best_stays_over_reopening(tmp_path, old):
    assert save(tmp_path, {2: 5.0, 4: 1.0, 6: 3.0, 8: 4.0}, old=old) == [4, 6, 8]
    assert save(tmp_path, {10: 6.0, 12: 2.0, 14: 3.0}, old=old) == [4, 12, 14]
    assert save(tmp_path, {16: None, 18: 1.0, 20: 9.0} if not old else {20: 9.0}, old=old)[0] == 4
    assert save(tmp_path, {22: 0.5}, old=old) == [20, 22], "a better one takes its place"
    assert Checkpoints(tmp_path, read_only=True).pick("best") == 22


def test_the_best_stays_without_looking_for_the_newest(tmp_path):
    save(tmp_path, {2: 5.0, 4: 1.0, 6: 3.0, 8: 4.0})
    for step in (10, 12, 14):
        checkpoints = Checkpoints(tmp_path, 2)
        checkpoints.save(step, STATE, {"tokens": 0}, 2.0)
        checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).steps() == [4, 12, 14]


def test_a_rollback_forgets_the_loss_of_what_is_gone(tmp_path):
    """Step 8 is saved twice: its first loss, the least of all, is that of a damaged checkpoint."""
    save(tmp_path, {4: 5.0, 6: 4.0})
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(8, STATE, {"tokens": 0}, 1.0)
    checkpoints.manager.wait_until_finished()
    flip(next((tmp_path / "checkpoints/8/state").rglob("0")))
    assert checkpoints.newest_whole() == 6
    for step in (8, 10, 12):
        checkpoints.save(step, STATE, {"tokens": 0}, 5.0)
    checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).steps() == [6, 10, 12]


@pytest.mark.parametrize("part", ["manifest.json", "meta/metadata", "state"])
def test_a_damaged_best_gives_way_to_the_next_best(tmp_path, capsys, part):
    save(tmp_path, {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0}, keep=9)
    damaged = tmp_path / "checkpoints/2" / part
    flip(damaged if damaged.is_file() else next(damaged.rglob("0")))
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.pick("best") == 4 and reader.pick(None) == 8
    assert save(tmp_path, {10: 5.0, 12: 5.0}, keep=1) == [4, 12]
    said = capsys.readouterr().err
    if part != "meta/metadata":  # it has no loss then
        assert "damaged   checkpoint 2: " in said and "set aside as" in said


def test_without_a_loss_there_is_no_best(tmp_path):
    assert save(tmp_path, {2: None, 4: None}) == [2, 4]
    reader = Checkpoints(tmp_path, read_only=True)
    with pytest.raises(BadInput, match=r"no whole checkpoint with a validation loss, of \[2, 4\]"):
        reader.pick("best")
    assert reader.pick(None) == 4


@pytest.mark.parametrize("patience, picked", [(0, 8), (2, 4), (3, 8)])
def test_a_run_that_stopped_early_is_used_at_its_best(tmp_path, capsys, patience, picked):
    """Without --step that is the newest checkpoint; two validations brought no better loss here."""
    losses = {2: 5.0, 4: 1.0, 6: 3.0, 8: 4.0}
    checkpoints = Checkpoints(tmp_path, 9)
    for step, loss in losses.items():
        past = [(s, found) for s, found in losses.items() if s <= step]
        meta = {"tokens": 0, "validations": past, "config": {"early_stop": patience}}
        checkpoints.save(step, STATE, meta, loss)
    checkpoints.close()
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.pick(None) == picked
    said = capsys.readouterr().err
    assert ("using checkpoint 4 with validation loss 1.0000" in said) == (picked == 4)
    assert ("--step=8 is its newest" in said) == (picked == 4)
    assert reader.pick(8) == 8 and reader.pick("best") == 4


def test_what_a_kill_left_of_a_save_is_removed(tmp_path):
    save(tmp_path, {2: 5.0})
    half = tmp_path / "checkpoints/7.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state/part").write_text("half")
    assert Checkpoints(tmp_path, read_only=True).pick(None) == 2 and half.exists()
    save(tmp_path, {4: 4.0})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


def test_the_losses_are_on_disk(tmp_path):
    save(tmp_path, {2: 5.0})
    meta = json.loads((tmp_path / "checkpoints/2/meta/metadata").read_text())
    assert meta == {"tokens": 2, "validation_loss": 5.0}


@pytest.mark.parametrize(
    "losses, best, context, rest",
    [
        ({2: 1.0, 4: 2.0}, 2, 210, " --max_new_tokens=199"),
        ({2: 2.0, 4: 1.0}, None, 211, ""),
        ({2: 2.0, 4: 1.0}, None, 11, " --beyond_context=slide"),
    ],
)
def test_the_end_of_a_run_names_the_best(tmp_path, capsys, losses, best, context, rest):
    """In what it suggests, where the best is not the last; and what the context has room for."""
    save(tmp_path, losses)
    config = dataclasses.replace(tiny_config(max_seq_len=context), num_steps=4)
    loop = Mock(
        spec=Loop,
        config=config,
        history=History(validations=list(losses.items())),
        checkpoints=Checkpoints(tmp_path, read_only=True),
        last_validation={"step": 4, "loss": losses[4]},
        data=Mock(tokenizer=ByteTokenizer()),
    )
    conclude(0, loop, epath.Path(tmp_path), Example("once upon a", False))
    said = capsys.readouterr().err
    flag = " --step=best" if best else ""
    line = f"jaxgpt.sample --workdir={tmp_path}{flag} --prompt='once upon a'{rest}\n"
    assert line in said and f"jaxgpt.evaluate --workdir={tmp_path}{flag}\n" in said
    assert ("(the best checkpoint is 2, loss 1.0000: --step=best)" in said) == bool(best)
