"""`evaluate --watch` ends with the run, and at once where there is nothing to wait for."""

import json
import time
from types import SimpleNamespace

import pytest
from etils import epath

from jaxgpt import convert, evaluate
from jaxgpt.jobs import evaluate as job
from jaxgpt.system.errors import BadInput
from jaxgpt.training.end import REASONS, forget_end, read_end, record_end
from tests.conftest import CORPUS
from tests.interchange.test_import_export import model_folder


def no_more_waiting(monkeypatch, during=lambda: pytest.fail("it would wait for ever")):
    """Calls `during` where `--watch` would wait."""
    clock = SimpleNamespace(sleep=lambda seconds: during(), perf_counter=time.perf_counter)
    monkeypatch.setattr(job, "time", clock)


def test_the_end_is_recorded_and_forgotten(tmp_path):
    folder = epath.Path(tmp_path)
    assert read_end(folder) == ""
    for reason in REASONS:
        record_end(folder, 7, reason)
        assert read_end(folder) == reason
    forget_end(folder)
    forget_end(folder)
    assert read_end(folder) == "" and not list(tmp_path.iterdir())
    for damaged in ("", "[]", "{}", '{"reason": 1}', "\0"):
        (tmp_path / "end.json").write_text(damaged)
        with pytest.raises(BadInput, match=r"end.json is damaged: .*; delete it"):
            read_end(folder)


def test_imported_weights_are_evaluated_once(command, tmp_path, monkeypatch):
    model_folder(tmp_path / "hf")
    command(convert.main, "import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/w")
    (tmp_path / "t.txt").write_text(CORPUS[:300])
    no_more_waiting(monkeypatch)
    argv = (f"--workdir={tmp_path}/w", "--watch", f"--data=text:{tmp_path}/t.txt")
    code, out, err = command(evaluate.main, *argv)
    assert code == 0 and [json.loads(line)["step"] for line in out.splitlines()] == [0], err


def file_for_a_folder(folder):
    folder.write_text("x")


def damaged_config(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{")


def diverged_at_once(folder):
    folder.mkdir()
    record_end(epath.Path(folder), 0, "diverged")


@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [
        (file_for_a_folder, [], "is a file, not a run's folder"),
        (damaged_config, [], "config.json"),
        (diverged_at_once, [], "ended (diverged) without a checkpoint"),
        (None, ["--task=poetry:x"], "--task=poetry:x is unknown"),
        (None, ["--task=arc:nowhere/*"], "no file matches nowhere/*"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_bad_input_is_not_waited_for(command, tmp_path, monkeypatch, make, flags, message, late):
    """Neither when it is there from the start, nor when it comes while waiting."""
    if late and make:
        no_more_waiting(monkeypatch, lambda: make(tmp_path / "w"))
    else:
        no_more_waiting(monkeypatch)
        if make:
            make(tmp_path / "w")
    code, out, err = command(evaluate.main, f"--workdir={tmp_path}/w", "--watch", *flags)
    assert (code, out) == (2, "") and message in err.splitlines()[-1], err
