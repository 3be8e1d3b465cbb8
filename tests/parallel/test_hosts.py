"""Real processes that train as one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxgpt import train
from tests.conftest import CORPUS, xla_flags
from tests.parallel.processes import (
    CONFIG,
    finish,
    free_port,
    rows,
    start,
    wait_for_checkpoint,
    wait_for_step,
)

SCRIPT = """
import sys, jax
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from jaxgpt.config import BadInput
from jaxgpt.config.cli import run
from jaxgpt.parallel.hosts import check_same, on_first
def refuse():
    raise BadInput(f"as process {jax.process_index()} sees it")
def main(argv):
    check_same("one corpus", "the config")
    assert on_first(lambda: {"from": jax.process_index()}) == {"from": 0}
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
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, address, count, str(i), value],
            env=env,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
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
    codes, _, errors = finish(start("train", 2, 2, *flags(place, "two")))
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


def test_a_killed_process_ends_the_other_and_four_go_on(place):
    children = start("train", 2, 2, *flags(place, "killed"))
    wait_for_checkpoint(place / "killed", 8, children)
    children[1].kill()
    began = time.monotonic()
    codes, _, errors = finish(children)
    assert time.monotonic() - began < 100  # a heartbeat's patience, where a save was under way
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


def test_the_death_of_process_0_ends_the_others_too(place):
    children = start("train", 2, 2, *flags(place, "headless"))
    wait_for_step(place / "headless", 2, children)
    children[0].kill()
    codes, _, errors = finish(children)
    assert codes[1] in (1, -signal.SIGABRT), errors
    assert errors[1].strip().splitlines()[-1].startswith("error: another process of this run")


@pytest.mark.parametrize("index", [0, 1])
def test_a_missing_process_is_an_error_after_a_while(place, index):
    args = [*flags(place, "alone"), "--join_timeout=3"]
    began = time.monotonic()
    codes, _, (error,) = finish(start("train", 2, 1, *args, only=[index]))
    assert codes == [2] and time.monotonic() - began < 60
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
