"""A disk that fills, a workdir that goes away, a clock that jumps: one line, then a resume."""

import contextlib
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import orbax.checkpoint as ocp
import pytest
from tensorboard.compat.proto import event_pb2

from jaxgpt import prepare, train
from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.cli import run as cli
from jaxgpt.metrics import rows as rows_module
from tests.conftest import xla_flags
from tests.processes.forks import Python
from tests.processes.processes import finish, rows, wait_for_step
from tests.training import until_full

CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=24, batch_size=8, log_every=1, eval_every=12, sample_every=0, checkpoint_every=8,
        model=ModelConfig(max_seq_len=24, num_layers=1, num_heads=2, embed_dim={width}),
        data=DataConfig(source="text:{corpus}/*.txt", validation_fraction=0.25),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=2),
        sample=SampleConfig(max_new_tokens=0),
    )
"""


@pytest.fixture
def run(corpus, tmp_path):
    """Starts the same run in a folder of tmp_path: `run(workdir, *flags)`."""

    def start(workdir="w", *args, width=32, cached=True, file_size=None, more=""):
        (tmp_path / "c.py").write_text(CONFIG.format(corpus=corpus, width=width) + more)
        argv = [f"--config={tmp_path}/c.py", f"--workdir={tmp_path / workdir}", *args]
        env = {"XLA_FLAGS": xla_flags(1), "JAX_ENABLE_COMPILATION_CACHE": str(cached).lower()}
        return Python("-m", "jaxgpt.train", *argv, env=os.environ | env, file_size=file_size)

    return start


def one_line(process) -> str:
    """The error of a process that must end with code 2 and no traceback."""
    (code,), _, (error,) = finish([process])
    assert code == 2 and "Traceback" not in error, error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: "), error
    return last


def goes_on(run, tmp_path, workdir="w", **kw) -> str:
    """Runs again, and compares with a run that nothing befell; returns what the former said."""
    (code,), _, (error,) = finish([run(workdir, **kw)])
    assert code == 0, error
    assert finish([run("whole", **kw)])[0] == [0]
    for split in ("train", "validation"):
        assert rows(tmp_path / workdir, split) == rows(tmp_path / "whole", split)
    return error


@pytest.mark.slow
@pytest.mark.parametrize("limit", [7_000, 30_000])
def test_files_that_may_not_grow(run, tmp_path, command, limit):
    """What a full disk does, on any machine: the smaller limit meets the rows, the other a save."""
    run("not-there").kill()  # writes the config
    assert command(prepare.main, f"--config={tmp_path}/c.py")[0] == 0
    every = f"--config.checkpoint_every={8 if limit > 7_000 else 0}"
    error = one_line(run("w", every, cached=False, file_size=limit))
    assert "cannot be written" in error and "File too large" in error
    assert ("metrics.jsonl" if limit == 7_000 else "checkpoint 8 ") in error
    goes_on(run, tmp_path)


@contextlib.contextmanager
def mounted(disk, options: str):
    """Yields `disk`, a file system in memory; skips the test where nothing can be mounted."""
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]).returncode:
        pytest.skip("no mounting here; test_files_that_may_not_grow covers it")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def remount(disk, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


# Where the room ends: when the first save begins, when the second does, in the midst of arrays.
FULL = [
    ("save", "size=64k,nr_inodes=4"),
    ("save", "size=500k,nr_inodes=45"),
    ("import", "size=300k"),
]


@pytest.mark.slow
@pytest.mark.parametrize("action, options", FULL)
def test_a_disk_too_small(tmp_path, action, options):
    """One line, within 20 s of the fault; Orbax's threads would hold the process for 300 s. Then
    the same command goes on, with what was whole, when there is room."""
    with mounted(tmp_path / "disk", options) as disk:
        process = Python("-m", "tests.training.until_full", action, disk)
        fault, lines = time.monotonic(), []
        for line in process.stderr:
            fault = time.monotonic()
            lines.append(line)
        assert process.wait() == 2 and time.monotonic() - fault < 20
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert "cannot be written" in lines[0] and "No space left on device" in lines[0]
        assert action == "save" or not list(disk.iterdir()), "a half import is left"
        remount(disk, "size=64m,nr_inodes=1000")
        until_full.main(["", action, disk])
        folder, step = (disk, 3) if action == "save" else (disk / "imported", 0)
        assert Checkpoints(folder, read_only=True).whole() == [step]


FILLING = """
import os, subprocess
from jaxgpt.checkpointing.checkpoints import Checkpoints
def save(checkpoints, step, *args, honest=Checkpoints.save):
    if step == 16 and not os.path.exists("{marker}"):
        open("{marker}", "w").close()
        disk = os.statvfs("{disk}")
        room = (disk.f_blocks - disk.f_bfree) * disk.f_frsize + 16384
        subprocess.run(["mount", "-o", f"remount,size={{room}}", "{disk}"], check=True)
    honest(checkpoints, step, *args)
Checkpoints.save = save
"""


def test_a_disk_that_fills_in_the_midst_of_a_save(run, tmp_path):
    """The run repeats every row from the checkpoint before."""
    with mounted(tmp_path / "disk", "size=64m") as disk:
        filling = FILLING.format(disk=disk, marker=tmp_path / "filled")
        error = one_line(run("disk/w", more=filling))  # of the save, or of a row that came first
        assert f"{disk}/w/" in error and "No space left on device" in error
        remount(disk, "size=64m")
        assert "resume    from checkpoint 8" in goes_on(run, tmp_path, "disk/w", more=filling)


def test_a_disk_that_is_full_before_the_first_step(run, tmp_path, command):
    """Of room for one file more each time: no checkpoints, no tokenizer, no config, no rows, ..."""
    run("not-there").kill()  # writes the config
    argv = (f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/disk/w", "--config.num_steps=2")
    with mounted(tmp_path / "disk", "size=1m,nr_inodes=1") as disk:
        for inodes in range(1, 8):
            remount(disk, f"nr_inodes={inodes}")
            code, out, err = command(train.main, *argv)
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            assert code == 2 and len(errors) == 1 and "Traceback" not in err + out, err
            assert "No space left on device" in errors[0]
        remount(disk, "size=64m,nr_inodes=1000")
        assert command(train.main, *argv)[0] == 0
        assert list(rows(disk / "w")) == [1, 2]


def test_a_workdir_removed_in_mid_run(run, tmp_path, command, monkeypatch):
    run("not-there").kill()  # writes the config
    argv = (f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w")
    write = rows_module.RowFile.write

    def removing(file, row):
        if row["step"] == 5:
            shutil.rmtree(tmp_path / "w")
        write(file, row)

    monkeypatch.setattr(rows_module.RowFile, "write", removing)
    code, _, err = command(train.main, *argv)
    assert code == 2 and "everything is in" not in err
    assert "metrics.jsonl was moved or deleted while the run was writing" in err.splitlines()[-1]
    assert not (tmp_path / "w").exists(), "nothing half-written is in its place"
    monkeypatch.undo()
    code, _, err = command(train.main, *argv)
    assert code == 0 and "resume" not in err
    assert list(rows(tmp_path / "w")) == list(range(1, 25))


@pytest.mark.parametrize("target", ["nowhere", "w"], ids=["dangling", "looping"])
def test_a_workdir_that_is_a_link_to_nothing(run, tmp_path, command, target):
    run("not-there").kill()  # writes the config
    (tmp_path / "w").symlink_to(tmp_path / target)
    for workdir in (tmp_path / "w", tmp_path / "w/below"):
        code, _, err = command(train.main, f"--config={tmp_path}/c.py", f"--workdir={workdir}")
        assert code == 2 and "is a link to" in err and len(err.splitlines()) == 1, err


def test_a_workdir_of_too_long_a_name(run, tmp_path, command):
    run("not-there").kill()  # writes the config
    for name in ("x" * 256, "é" * 128, "/".join(["d" * 200] * 25)):
        code, _, err = command(
            train.main, f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/{name}"
        )
        assert code == 2 and "File name too long" in err and len(err.splitlines()) == 1, err


def test_a_workdir_that_turns_unwritable(run, tmp_path):
    process = run("w", "--config.num_steps=100000")
    wait_for_step(tmp_path / "w", 10, [process])
    folder = tmp_path / "w/checkpoints"
    folder.rename(tmp_path / "w/away")
    folder.write_text("in the way")  # root writes to every folder, but not into a file
    assert "cannot be written to" in one_line(process)
    folder.unlink()
    (tmp_path / "w/away").rename(folder)
    goes_on(run, tmp_path)


def test_threads_of_a_failed_save_do_not_hold_the_process(monkeypatch):
    """Orbax's may wait for minutes; a program that is not ours is left alone."""
    monkeypatch.setattr(cli, "GRACE", 0.2)
    done = threading.Event()

    def join(thread, timeout=None):
        raise TimeoutError("did not complete")  # as Orbax's own do, or what ended the thread

    # a class of Orbax's module, as its own threads are; an idle pool's threads hold nobody
    members = {"__module__": "orbax.future", "join": join}
    stuck = type("Signals", (threading.Thread,), members)(target=done.wait)
    stuck.start()
    try:
        assert not cli._is_held()
        ours = SimpleNamespace(__spec__=SimpleNamespace(name="jaxgpt.train"))
        monkeypatch.setitem(sys.modules, "__main__", ours)
        assert cli._is_held()
        done.set()
        assert not cli._is_held()
    finally:
        done.set()
        threading.Thread.join(stuck)


def plotted(workdir) -> dict[str, list[int]]:
    """The steps of each curve as TensorBoard reads them: files by name, restarts purge."""
    curves: dict[str, list[int]] = {}
    for file in sorted((workdir / "tensorboard").iterdir()):
        raw, at = file.read_bytes(), 0
        while at + 12 <= len(raw):
            (size,) = struct.unpack_from("Q", raw, at)
            record, at = raw[at + 12 : at + 12 + size], at + 16 + size
            if len(record) < size:
                break  # a kill left half of it behind
            event = event_pb2.Event.FromString(record)
            if event.HasField("session_log"):
                curves = {k: [s for s in steps if s < event.step] for k, steps in curves.items()}
            for value in event.summary.value:
                curves.setdefault(value.tag, []).append(event.step)
    return curves


@pytest.mark.slow
def test_a_clock_that_jumps(run, tmp_path, command, monkeypatch):
    run("not-there").kill()  # writes the config
    honest, save, ahead = time.time, ocp.CheckpointManager.save, [0]
    jumps = itertools.cycle([86_400, 0, -7200, -90_000, 0])  # each while a save is under way

    def jumping(*args, **kw):
        save(*args, **kw)
        ahead[0] += next(jumps)

    monkeypatch.setattr(time, "time", lambda: honest() + ahead[0])
    monkeypatch.setattr(ocp.CheckpointManager, "save", jumping)
    argv = (f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w", "--config.sample_every=0")
    constant = "--config.optim.schedule=constant"
    said = ""
    for steps in (10, 17, 24):
        code, _, err = command(train.main, *argv, constant, f"--config.num_steps={steps}")
        assert code == 0 and "done      validation loss" in err, err
        assert Checkpoints(tmp_path / "w", read_only=True).newest_whole() == steps
        said += err
    assert said.count("unsaved   checkpoint") >= 1, "a jump was met"
    monkeypatch.undo()
    whole = (argv[0], f"--workdir={tmp_path}/whole", constant, argv[2])
    assert command(train.main, *whole)[0] == 0
    assert rows(tmp_path / "w") == rows(tmp_path / "whole")
    lines = map(json.loads, (tmp_path / "w/metrics.jsonl").read_text().splitlines())
    seconds = [row["seconds"] for row in lines]
    assert seconds == sorted(seconds) and seconds[-1] < 600
    assert plotted(tmp_path / "w")["train/loss"] == list(range(1, 25))


@pytest.mark.slow
def test_tensorboard_after_kills_shows_each_step_once(run, tmp_path):
    for _ in range(3):
        process = run("w", "--config.num_steps=100000", "--config.eval_every=0")
        wait_for_step(tmp_path / "w", max(rows(tmp_path / "w"), default=0) + 11, [process])
        process.kill()
        finish([process])
    last = max(rows(tmp_path / "w"))
    assert finish([run("w", f"--config.num_steps={last}", "--config.eval_every=0")])[0] == [0]
    assert list(rows(tmp_path / "w")) == list(range(1, last + 1))
    seen = plotted(tmp_path / "w")["train/loss"]
    assert seen == sorted(set(seen)) and seen[-1] == last


def test_rows_on_an_object_store_are_whole_at_every_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "is_object_store", lambda path: True)
    file = tmp_path / "metrics.jsonl"
    first = rows_module.RowFile(file, 0)
    for step in (1, 2, 3):
        first.write({"step": step})
        if step == 2:
            first.sync()
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n', "row 3 waits, and a kill loses it"
    second = rows_module.RowFile(file, 1)
    second.write({"step": 2, "again": True})
    second.close()
    assert file.read_text() == '{"step": 1}\n{"step": 2, "again": true}\n'
