"""Real processes that train as one."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from jaxgpt import train
from jaxgpt.objectives import language as objectives
from jaxgpt.processes.hosts import HEARTBEAT
from tests.conftest import CORPUS, wait_until, xla_flags
from tests.processes.forks import Python
from tests.processes.processes import (
    CONFIG,
    finish,
    free_port,
    rows,
    start,
    wait_for_checkpoint,
    wait_for_step,
)

SCRIPT = r"""
import sys, jax
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from jaxgpt.system.errors import BadInput, PeerLost
from jaxgpt.cli.run import run
from jaxgpt.processes.hosts import check_same, on_first
FAULTS = [  # what process 0 does, what it raises, what the others raise, what that says
    (lambda: open("/no/file"), FileNotFoundError, PeerLost, "No such file"),
    (lambda: 1 / 0, ZeroDivisionError, PeerLost, "ZeroDivisionError"),
    (lambda: sys.exit(143), SystemExit, SystemExit, "143"),
    (lambda: "\U0001f600" * 9999, ValueError, PeerLost, "bytes to tell"),
    (lambda: object(), TypeError, PeerLost, "TypeError"),
]
def refuse():
    raise BadInput(f"as process {jax.process_index()} sees it" + "\U0001f600" * 9999)
def main(argv):
    check_same("one corpus", "the config")
    assert on_first(lambda: {"from": jax.process_index()}) == {"from": 0}
    for act, there, elsewhere, message in FAULTS:
        try:
            on_first(act)
            raise AssertionError("a fault of process 0 is one of all")
        except (there, elsewhere) as e:
            assert isinstance(e, elsewhere if jax.process_index() else there), e
            assert message in f"{type(e).__name__}: {e}" or jax.process_index() == 0, e
    check_same(sys.argv[4], "the prepared text")
    on_first(refuse)
run(main)
"""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("aa", "error: as process 0 sees it"),
        ("ab", "error: the prepared text of process(es) 1 differs from that of process 0"),
    ],
)
def test_processes_compare_what_they_read_and_follow_the_first(values, expected):
    address, count = f"127.0.0.1:{free_port()}", str(len(values))
    env = os.environ | {"XLA_FLAGS": xla_flags(1)}
    children = [
        Python("-c", SCRIPT, address, count, str(i), value, env=env)
        for i, value in enumerate(values)
    ]
    codes, _, errors = finish(children)
    assert codes == [2, 2], errors
    assert all(expected in error for error in errors)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config, its corpus, a cache, and the run of one process with 4 devices."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "corpus").mkdir()
    for i in range(3):
        (folder / "corpus" / f"{i}.txt").write_text(CORPUS[i * 3000 : (i + 1) * 3000])
    (folder / "c.py").write_text(CONFIG.format(corpus=folder / "corpus"))
    codes, _, errors = finish(start("train", 1, 4, *flags(folder, "one")))
    assert codes == [0], errors
    return folder


def flags(folder, workdir: str) -> list[str]:
    return [
        f"--config={folder}/c.py",
        f"--workdir={folder / workdir}",
        f"--config.data.cache_dir={folder}/cache",
    ]


def test_two_processes_train_like_one_and_again_bit_for_bit(place):
    sampled = "--config.sample.max_new_tokens=2"
    codes, _, errors = finish(start("train", 2, 2, *flags(place, "two"), sampled, fresh=True))
    assert codes == [0, 0], errors
    for split in ("train", "validation"):
        one, two = rows(place / "one", split), rows(place / "two", split)
        assert two == pytest.approx(one, rel=1e-5)
    assert "done" in errors[0] and "step" not in errors[1]  # people read one process's words

    children = start("train", 2, 2, *flags(place, "stopped"))
    wait_for_step(place / "stopped", 4, children)
    children[1].send_signal(signal.SIGTERM)  # one process alone is told
    codes, _, errors = finish(children)
    assert codes == [143, 143], errors
    assert "stopped   by signal 15 after step" in errors[0]
    codes, _, errors = finish(start("train", 2, 2, *flags(place, "stopped")))
    assert codes == [0, 0] and "resume    from checkpoint" in errors[0]
    assert rows(place / "stopped") == rows(place / "two")


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_four_go_on(place):
    children = start("train", 2, 2, *flags(place, "killed"))
    wait_for_checkpoint(place / "killed", 8, children)
    children[1].kill()
    began = time.monotonic()
    codes, _, errors = finish(children)
    # a heartbeat's patience, where a save was under way, and what a busy machine adds
    assert time.monotonic() - began < HEARTBEAT + 270
    assert codes[0] in (1, 134) and codes[1] == -signal.SIGKILL or codes[0] == -signal.SIGABRT
    assert errors[0].strip().splitlines()[-1].startswith("error: another process of this run")

    codes, _, errors = finish(start("train", 4, 1, *flags(place, "killed")))
    assert codes == [0] * 4, errors
    assert "resume    from checkpoint" in errors[0]
    assert rows(place / "killed") == pytest.approx(rows(place / "one"), rel=1e-5)

    codes, out, errors = finish(start("evaluate", 2, 2, f"--workdir={place / 'killed'}"))
    assert codes == [0, 0], errors
    found = json.loads(out[0].splitlines()[-1])
    assert found["loss"] == pytest.approx(rows(place / "one", "validation")[24], abs=1e-5)
    assert "{" not in out[1]


@pytest.mark.slow
def test_a_pipeline_across_two_processes_trains_and_goes_on_after_one_was_killed(place):
    """Apart from the other axes, as a mixture is not pipelined."""
    mesh = "--config.mesh.data=1", "--config.mesh.pipeline=2"
    args = *flags(place, "stages"), "--config.model.num_layers=4"
    children = start("train", 2, 1, *args, *mesh)
    wait_for_checkpoint(place / "stages", 8, children)
    children[1].kill()
    children[0].kill()  # without waiting until it misses the other: a test above does
    finish(children)
    codes, _, errors = finish(start("train", 2, 1, *args, *mesh))
    assert codes == [0, 0] and "resume    from checkpoint" in errors[0], errors
    alone = *flags(place, "no stages"), "--config.model.num_layers=4", "--config.mesh.data=1"
    codes, _, errors = finish(start("train", 1, 1, *alone))
    assert codes == [0], errors
    assert rows(place / "stages") == pytest.approx(rows(place / "no stages"), rel=1e-4)


@pytest.mark.slow
def test_every_axis_goes_over_two_processes_which_are_killed_and_go_on(place):
    """Of one device each, so that the axis crosses from one to the other; each turn goes on from
    the checkpoint of a mesh of another axis, after SIGKILL."""
    args = ["--config.model.num_experts=2", "--config.model.expert_dim=16"]
    args += ["--config.model.num_layers=2", "--config.checkpoint_every=4"]
    alone = ["--config.mesh.data=1", "--config.mesh.fsdp=1"]
    codes, _, errors = finish(start("train", 1, 1, *flags(place, "axes-one"), *args, *alone))
    assert codes == [0], errors
    turns = ["data", "fsdp", "tensor", "context", "expert"]
    for turn, axis in enumerate(turns, start=1):
        mesh = [*alone, f"--config.mesh.{axis}=2"]
        children = start("train", 2, 1, *flags(place, "axes-two"), *args, *mesh)
        if axis != turns[-1]:
            wait_for_checkpoint(place / "axes-two", 4 * turn, children)
            children[1].kill()  # the other would wait for it as long as a heartbeat may be late
            children[0].kill()
            finish(children)
    codes, _, errors = finish(children)
    assert codes == [0, 0] and f"checkpoint {4 * (len(turns) - 1)}" in errors[0], errors
    assert rows(place / "axes-two") == pytest.approx(rows(place / "axes-one"), rel=1e-4)


@pytest.mark.slow
def test_weights_to_start_from_are_split_over_processes(place, command):
    """Some tokens have no row in the weights, which are drawn; DoRA's magnitudes are computed."""
    args = [
        f"--config.init_from={place / 'one'}",
        "--config.num_steps=2",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=-1",
        "--config.model.vocab_size=300",
        "--config.lora.rank=2",
        "--config.lora.dora=true",
        "--config.optim.freeze=tokens",
    ]
    codes, _, errors = finish(start("train", 2, 2, *flags(place, "warm-two"), *args))
    assert codes == [0, 0], errors
    assert command(train.main, *flags(place, "warm-one"), *args)[0] == 0
    assert rows(place / "warm-two") == pytest.approx(rows(place / "warm-one"), rel=1e-5)
    assert rows(place / "warm-two")[1] < rows(place / "one")[1] - 0.5


POISONED = """
import jax.numpy as jnp
from jaxgpt.processes.hosts import HEARTBEAT
from jaxgpt.objectives import language as objectives
honest = objectives.hidden_and_figures
def poisoned(model, micro, key):
    x, figures = honest(model, micro, key)
    bad = jnp.any(micro["inputs"] == 1, axis=-1)[:, None, None]
    return jnp.where(bad, jnp.nan, x), figures
objectives.hidden_and_figures = poisoned
"""


@pytest.mark.slow
def test_a_bad_stretch_that_one_process_reads_takes_all_of_them_back(place, command, monkeypatch):
    """Batches 9 and 10 hold a poisonous byte in their row 5 of 8, which process 1 reads."""
    (place / "bad").mkdir()
    text = np.resize(np.frombuffer(b"abcdefgh ", np.uint8), 8 * 32 * 30)
    for batch in (9, 10):
        text[batch * 8 * 32 + 5 * 32 + 3] = 1
    (place / "bad/train.txt").write_bytes(text.tobytes())
    (place / "bad/valid.txt").write_text("abcdefgh " * 40)
    config = CONFIG.format(corpus=place / "bad").replace("*.txt", "train.txt")
    (place / "bad/c.py").write_text(config + POISONED)
    args = [
        f"--config={place}/bad/c.py",
        f"--config.data.cache_dir={place}/cache",
        f"--config.data.validation_source=text:{place}/bad/valid.txt",
        "--config.data.shuffle=false",
        "--config.max_bad_steps=2",
        "--config.num_steps=14",
    ]
    codes, _, errors = finish(start("train", 2, 2, *args, f"--workdir={place}/bad-two"))
    assert codes == [0, 0] and "back to checkpoint 8, without batches 9, 10" in errors[0], errors
    monkeypatch.setattr(
        objectives, "hidden_and_figures", objectives.hidden_and_figures
    )  # the config replaces it
    code, _, err = command(train.main, *args, f"--workdir={place}/bad-one")
    assert code == 0 and "back to checkpoint 8, without batches 9, 10" in err
    two, one = rows(place / "bad-two"), rows(place / "bad-one")
    assert len(two) == 14 and two == pytest.approx(one, rel=1e-5)


def test_the_death_of_process_0_ends_the_others_too(place):
    children = start("train", 2, 2, *flags(place, "headless"))
    wait_for_step(place / "headless", 2, children)
    children[0].kill()
    codes, _, errors = finish(children)
    assert codes[1] in (1, -signal.SIGABRT), errors
    assert errors[1].strip().splitlines()[-1].startswith("error: another process of this run")


MOMENTS = {  # the function that both processes have entered when the signals come
    "joining": "jax.distributed.initialize",
    "checking": "jaxgpt.jobs.train.check_memory",
    "compiling": "jaxgpt.training.setup.Training.compile_step",
    "restoring": "jaxgpt.checkpointing.checkpoints.Checkpoints.restore",
    "saving": "jaxgpt.checkpointing.checkpoints.Checkpoints.save",
    "leaving": "jaxgpt.metrics.rows.Reporter.close",
}
MARKED = """
import os, pkgutil
owner, _, name = {place!r}.rpartition(".")
owner = pkgutil.resolve_name(owner)
def marked(*args, honest=getattr(owner, name), **kw):
    open(f"{folder}/{{os.getpid()}}", "w").close()
    return honest(*args, **kw)
setattr(owner, name, marked)
"""


@pytest.mark.parametrize(
    ("moment", "order", "apart", "number"),
    [
        ("joining", (0, 1), 0.0, signal.SIGTERM),
        ("joining", (1, 0), 0.5, signal.SIGTERM),
        ("checking", (1, 0), 0.0, signal.SIGINT),
        ("compiling", (1, 0), 0.5, signal.SIGINT),
        ("restoring", (1, 0), 0.1, signal.SIGTERM),
        ("saving", (0, 1), 0.1, signal.SIGTERM),
        ("leaving", (0, 1), 0.0, signal.SIGTERM),
    ],
)
def test_a_signal_at_any_moment_ends_every_process(place, tmp_path, moment, order, apart, number):
    """Outside the loop at once: JAX's barrier would wait, and abort whoever is left alone."""
    mark = MARKED.format(place=MOMENTS[moment], folder=tmp_path)
    (tmp_path / "c.py").write_text((place / "c.py").read_text() + mark)
    args = [f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w"]
    args += [f"--config.data.cache_dir={place}/cache"]
    if moment == "restoring":
        shutil.copytree(place / "one", tmp_path / "w")
    steps = 24 if moment == "leaving" else 100_000
    args.append(f"--config.num_steps={steps}")
    missing = 1 if moment == "joining" else 0  # whom all wait for
    children = start("train", 2 + missing, 2, *args, only=(0, 1))
    try:
        for child in children:
            wait_until((tmp_path / str(child.pid)).exists, *children)
        if moment == "joining":
            time.sleep(1)  # until it waits in C++
        for index in order:
            children[index].send_signal(number)
            time.sleep(apart)
        began = time.monotonic()
        codes, _, errors = finish(children)
    finally:
        for child in children:
            child.kill()
    assert codes == [128 + number] * 2, errors
    assert "error: " not in "".join(errors) and "Traceback" not in "".join(errors), errors
    assert time.monotonic() - began < HEARTBEAT, "the patience of JAX's barrier"


@pytest.mark.parametrize("index", [0, 1])
def test_a_missing_process_is_an_error_after_a_while(place, index):
    args = [*flags(place, "alone"), "--join_timeout=3"]
    began = time.monotonic()
    codes, _, (error,) = finish(start("train", 2, 1, *args, only=[index]))
    assert codes == [2] and time.monotonic() - began < 300, "the default of --join_timeout"
    assert "error: not all processes came to the coordinator 127.0.0.1:" in error
    assert "Traceback" not in error and not (place / "alone").exists()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--process_id=1"], "--num_processes and --process_id need --coordinator=HOST:PORT"),
        (["--coordinator=here:1"], "--coordinator needs --num_processes=N and --process_id=I"),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "is not HOST:PORT"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "not one of 0 .. 1"),
    ],
)
def test_flags_that_do_not_go_together(place, command, args, expected):
    code, _, err = command(train.main, *flags(place, "never"), *args)
    assert code == 2 and expected in err
    assert not (place / "never").exists()
