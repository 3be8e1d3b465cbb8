"""The launch scripts, with stand-ins for gcloud, srun and scontrol that write down their calls."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from absl import flags

from jaxgpt.processes.flags import define_flags
from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
SHELLCHECK = str(Path(sys.executable).with_name("shellcheck"))
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def bash(script: str | Path, *args: str, env=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *args],
        env=os.environ | {"RESTART_PAUSE": "0"} | (env or {}),
        capture_output=True,
        text=True,
    )


def stand_in(folder: Path, name: str, body: str) -> dict:
    """Puts a command `name` in front of PATH; returns the environment that has it."""
    (folder / "bin").mkdir(exist_ok=True)
    file = folder / "bin" / name
    file.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{folder}/calls\n{body}\n')
    file.chmod(0o755)
    return {"PATH": f"{folder}/bin:{os.environ['PATH']}"}


def counting(folder: Path, *codes: int) -> str:
    """A shell line that ends with the next of `codes` at each call."""
    return (
        f"n=$(cat {folder}/n 2>/dev/null || echo 0); echo $((n + 1)) >{folder}/n;"
        f" codes=({' '.join(map(str, codes))}); exit ${{codes[$n]}}"
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    found = subprocess.run([SHELLCHECK, str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("codes", "last", "starts"),
    [
        ((1, 134, 143, 0), 0, 4),  # a lost peer, an abort, a preempted one, done
        ((2,), 2, 1),
        ((3,), 3, 1),
        ((130,), 130, 1),
        ((1, 1, 1, 1, 1, 1), 1, 5),
    ],
)
def test_restart_goes_on_only_where_that_helps(tmp_path, codes, last, starts):
    found = bash("restart.sh", "bash", "-c", counting(tmp_path, *codes))
    assert found.returncode == last, found.stderr
    assert int((tmp_path / "n").read_text()) == starts


def test_restart_counts_failures_anew_after_a_long_run(tmp_path):
    env = {"RESTART_HEALTHY": "0"}  # seconds: every run is long
    found = bash("restart.sh", "bash", "-c", counting(tmp_path, *[1] * 6, 0), env=env)
    assert (found.returncode, (tmp_path / "n").read_text()) == (0, "7\n"), found.stderr


def test_a_run_that_only_waits_for_others_is_not_a_long_one():
    values = flags.FlagValues()
    define_flags(values)
    values.mark_as_parsed()
    long = int(re.search(r"RESTART_HEALTHY:-(\d+)", (LAUNCH / "restart.sh").read_text())[1])
    assert long > 2 * values.join_timeout


def test_restart_hands_a_stop_on_and_ends(tmp_path):
    body = (
        f"trap 'echo saved >>{tmp_path}/saved; exit 143' TERM; touch {tmp_path}/up; sleep 60 & wait"
    )
    process = subprocess.Popen(["bash", str(LAUNCH / "restart.sh"), "bash", "-c", body])
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert (tmp_path / "saved").read_text() == "saved\n", "once: it was not started again"


def test_gpu_host_trains_with_the_flags_it_got(tmp_path):
    env = stand_in(tmp_path, "python-stand-in", counting(tmp_path, 1, 0))
    found = bash("gpu_host.sh", "c.py", "--workdir=a b", env=env | {"PYTHON": "python-stand-in"})
    assert found.returncode == 0, found.stderr
    call = "python-stand-in -m jaxgpt.train --config=c.py --workdir=a b\n"
    assert (tmp_path / "calls").read_text() == call * 2
    assert bash("gpu_host.sh").returncode == 2


@pytest.mark.parametrize(
    ("code", "last", "requeued"), [(0, 0, False), (2, 2, False), (143, 0, True), (1, 0, True)]
)
def test_slurm_goes_back_into_the_queue(tmp_path, code, last, requeued):
    stand_in(tmp_path, "scontrol", "exit 0")
    env = stand_in(tmp_path, "srun", f"exit {code}") | {"SLURM_JOB_ID": "7", "PYTHON": "py"}
    found = bash("slurm.sbatch", "c.py", "--config.seed=1", env=env)
    assert found.returncode == last, found.stderr
    calls = (tmp_path / "calls").read_text()
    assert "py -m jaxgpt.train --config=c.py --config.seed=1" in calls
    assert ("scontrol requeue 7" in calls) == requeued
    worn = bash("slurm.sbatch", "c.py", env=env | {"SLURM_RESTART_COUNT": "100"})
    assert worn.returncode == code


GCLOUD = """
case "$*" in
*describe*) cat {folder}/state 2>/dev/null ;;
*create*) echo READY >{folder}/state ;;
*delete*) rm -f {folder}/state ;;
*scp*) cp "$5" {folder}/bundle.tar.gz ;;
*"cat jaxgpt/exit"*) echo "$(cat {folder}/last)" ;;
*jaxgpt.train*)
  if [ -e {folder}/preempted ]; then echo 0 >{folder}/last; exit 0; fi
  touch {folder}/preempted; echo PREEMPTED >{folder}/state; exit 1 ;;
esac
"""


@pytest.fixture
def tpu_pod(tmp_path) -> Path:
    """`tpu_pod.sh` in a small checkout, which holds what must not be packed and what must."""
    checkout = tmp_path / "a checkout"
    for name in ("launch", "configs", ".venv/bin", "runs/tiny"):
        (checkout / name).mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu_pod.sh", checkout / "launch")
    shutil.copy(ROOT / ".gitignore", checkout)
    for name in ("configs/deleted.py", ".venv/bin/python", "runs/tiny/config.json"):
        (checkout / name).write_text("x")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", checkout, *command], check=True)
    (checkout / "configs/deleted.py").unlink()
    (checkout / "configs/new é.py").write_text("not added yet")
    return checkout / "launch/tpu_pod.sh"


def test_tpu_pod_makes_the_slice_again_after_a_preemption(tpu_pod, tmp_path):
    (tmp_path / "last").write_text("unknown")
    env = stand_in(tmp_path, "gcloud", GCLOUD.format(folder=tmp_path))
    env |= {"ZONE": "z", "TYPE": "v5litepod-16", "SPOT": "1"}
    flags = ["configs/small.py", "--workdir=gs://b/r", "--config.data.source=text:a b*"]
    found = bash(tpu_pod, "slice", *flags, env=env)
    assert found.returncode == 0, found.stderr
    assert "the slice is PREEMPTED" in found.stderr
    calls = (tmp_path / "calls").read_text()
    verbs = re.findall(r"^gcloud compute tpus tpu-vm (create|delete|scp|ssh)", calls, re.M)
    once = ["create", "scp", "ssh", "ssh", "ssh"]  # install, train, read the exit code
    assert verbs == [*once, "delete", *once]
    assert calls.count("--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot") == 2
    command = r"--config=configs/small.py --workdir=gs://b/r --config.data.source=text:a\ b\*"
    assert calls.count(command) == 2
    assert "--zone=z" in calls
    with tarfile.open(tmp_path / "bundle.tar.gz") as bundle:
        packed = sorted(bundle.getnames())
    assert packed == [".gitignore", "configs/new é.py", "launch/tpu_pod.sh"]


def test_tpu_pod_stops_at_bad_input(tpu_pod, tmp_path):
    (tmp_path / "last").write_text("2")
    (tmp_path / "state").write_text("READY")
    env = stand_in(tmp_path, "gcloud", GCLOUD.format(folder=tmp_path)) | {"ZONE": "z", "TYPE": "t"}
    assert bash(tpu_pod, "slice", "c.py", env=env).returncode == 2
    assert bash(tpu_pod, "slice", "c.py", env={"TYPE": "t", "ZONE": ""}).returncode != 0
    shutil.rmtree(tpu_pod.parent.parent / ".git")
    env["GIT_CEILING_DIRECTORIES"] = str(tmp_path)
    found = bash(tpu_pod, "slice", "c.py", env=env)
    assert found.returncode == 2 and "not a git repository" in found.stderr
