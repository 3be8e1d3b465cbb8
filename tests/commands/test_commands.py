"""`jaxgpt COMMAND`, and configs by name, from a checkout and from what a wheel holds."""

import os
import shutil
import subprocess
import sys

import pytest

from jaxgpt.__main__ import commands
from tests.conftest import ROOT


def jaxgpt(*args: str, cwd, path=ROOT) -> tuple[int, str, str]:
    """Runs `python -m jaxgpt` with the package in `path`; returns exit code, stdout and stderr."""
    found = subprocess.run(
        [sys.executable, "-m", "jaxgpt", *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    return found.returncode, found.stdout, found.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder that setuptools fills for a wheel: what site-packages would get."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("jaxgpt", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "lib"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "lib"


def test_without_a_command_all_are_listed_with_a_line_each(tmp_path):
    code, out, err = jaxgpt(cwd=tmp_path)
    rows = dict(line.split(maxsplit=2)[1:] for line in out.splitlines() if "jaxgpt " in line[:7])
    files = {file.stem for file in (ROOT / "jaxgpt").glob("*.py")} - {"__init__", "__main__"}
    assert (code, err, set(rows)) == (0, "", files)
    assert all(3 <= len(line) <= 80 for line in rows.values()) and rows["train"] == "Train a GPT"


def test_the_launcher_is_the_module_and_the_command_that_is_installed(tmp_path):
    whole = jaxgpt("train", "--help", cwd=tmp_path)
    alone = subprocess.run(
        [sys.executable, "-m", "jaxgpt.train", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert whole == (0, alone.stdout, alone.stderr) and "--workdir" in whole[1]
    assert "jaxgpt = jaxgpt.__main__:start" in (ROOT / "setup.cfg").read_text()


@pytest.mark.parametrize(
    "args, says",
    [
        (["trian", "--config=tiny"], "unknown command trian; did you mean train?"),
        (["xyz"], f"unknown command xyz; choose {', '.join(commands())}"),
        (["--config=tiny"], "say which command"),
        (
            ["train", "--config=nope"],
            "config file nope does not exist; by name there are bert_base, distill, finetune",
        ),
        (["train", "--config=tyny"], "config file tyny does not exist; did you mean tiny?"),
        (["train", "--config=configs/tiny.py"], "does not exist; did you mean tiny?"),
        (["train", "--config=tiny", "--config.num_steps=0"], "num_steps=0"),
        (["sweep", "--config=tiny", "--grid=num_steps=0"], "num_steps=0 is not a possible run"),
    ],
)
def test_errors_from_another_folder(args, says, built, tmp_path):
    """As one line, the same from a checkout and from what a wheel holds."""
    from_checkout = jaxgpt(*args, cwd=tmp_path)
    assert from_checkout == jaxgpt(*args, cwd=tmp_path, path=built)
    code, out, err = from_checkout
    assert (code, out, len(err.splitlines())) == (2, "", 1) and err.startswith("error: ")
    assert says in err


def test_a_wheel_holds_every_room_and_config(built):
    def files(folder, pattern):
        return {str(file.relative_to(folder)) for file in folder.rglob(pattern)}

    assert files(built / "jaxgpt" / "configs", "*") == files(ROOT / "configs", "*.py")
    shutil.rmtree(built / "jaxgpt" / "configs")
    for pattern in ("*.py", "*.html"):
        assert files(built / "jaxgpt", pattern) == files(ROOT / "jaxgpt", pattern)


def test_a_file_goes_before_a_config_of_the_same_name(tmp_path):
    (tmp_path / "tiny").write_text("raise ValueError('mine')")
    code, _, err = jaxgpt("train", "--config=tiny", cwd=tmp_path)
    assert code == 2 and "mine" in err
