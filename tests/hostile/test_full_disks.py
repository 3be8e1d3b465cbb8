"""Disks that fill in a sweep or in the caches: one line with a path, exit 2, nothing half-written.

The disk is a tmpfs with room for one file, or for a few pages, more each time: every file that a
command writes is once the one that does not fit. Training's own disks: tests/training/test_disk.py.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxgpt import prepare, sweep
from jaxgpt.sweeps import runner
from tests.sweeps.test_sweep import CONFIG, GRID, trainer


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A tmpfs of little room: `disk(options)` gives it another size and returns its path."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "tmpfs", folder]
    if subprocess.run(mount).returncode:
        pytest.skip("only root may mount; tests/data/test_prepare.py limits the size of files")

    def resized(options: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
        return folder

    yield resized
    subprocess.run(["umount", "-l", folder], check=True)


def refused(code: int, out: str, err: str, folder: Path) -> None:
    """Asserts that a command ended for want of room, said where, and left nothing half-written."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in out + err, err
    assert "No space left on device" in errors[0] and str(folder) in errors[0]
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def growing(kind: str) -> Iterator[str]:
    """Yields the disk's sizes, a file or a doubling of its bytes more each time."""
    if kind == "files":
        return (f"size=64m,nr_inodes={count}" for count in range(1, 100))
    return (f"size={4 << count}k,nr_inodes=1000" for count in range(20))


@pytest.mark.parametrize("kind", ["files", "bytes"])
def test_a_cache(disk, command, corpus, tmp_path, kind):
    """Cleaning, training a tokenizer, tokenizing and packing."""
    (tmp_path / "c.py").write_text(CONFIG.format(corpus=corpus))
    argv = [
        f"--config={tmp_path}/c.py",
        "--config.data.tokenizer=sentencepiece:400",
        "--config.data.clean=unicode,exact_dedup",
        "--config.data.pack=true",
    ]
    failures = 0
    for options in growing(kind):
        folder = disk(options)
        code, out, err = command(prepare.main, *argv, f"--config.data.cache_dir={folder}/cache")
        if not code:
            break
        refused(code, out, err, folder)
        failures += 1
    assert failures > (10 if kind == "files" else 3)
    elsewhere = command(prepare.main, *argv, f"--config.data.cache_dir={tmp_path}/other")
    found, wanted = (json.loads(text.splitlines()[-1]) for text in (out, elsewhere[1]))
    assert found | {"cache": ""} == wanted | {"cache": ""}
    assert tokens_in(folder / "cache") == tokens_in(tmp_path / "other") != {}


def tokens_in(cache: Path) -> dict[str, bytes]:
    """Returns the token files by name, and what they hold."""
    return {str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*.bin")}


class Trained:
    """Stands in for a training process: `trainer` at once, in this one."""

    def __init__(self, argv: list[str], stdout, **popen):
        try:
            os.write(stdout.fileno(), b"a line\n")
            self.code = trainer(argv[argv.index("jaxgpt.train") + 1 :], "", None)
        except OSError:  # `train` writes whole files, `trainer` does not
            shutil.rmtree(argv[-1].removeprefix("--workdir="), ignore_errors=True)
            self.code = 2

    def wait(self) -> int:
        return self.code


@pytest.mark.parametrize("kind", ["files", "bytes"])
def test_a_sweep(disk, command, corpus, tmp_path, monkeypatch, kind):
    """Its folders, the runs' logs, results.json and results.svg."""
    (tmp_path / "c.py").write_text(CONFIG.format(corpus=corpus))
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=Trained))
    failures = 0
    for options in growing(kind):
        folder = disk(options)
        argv = (f"--config={tmp_path}/c.py", f"--grid={GRID}", f"--workdir={folder}/s")
        code, out, err = command(sweep.main, *argv)
        if not code:
            break
        if code == 2:
            refused(code, out, err, folder)
            failures += 1
        else:  # only runs met the end of the room, and say so in their logs
            assert code == 1 and "runs failed" in err.splitlines()[-1]
        if (file := folder / "s/results.json").exists():
            json.loads(file.read_text())
    assert failures >= (5 if kind == "files" else 1)
    assert [row["loss"] for row in json.loads(file.read_text())] == [1e-4, 1e-3, 1e-2]
    assert (folder / "s/results.svg").read_text().endswith("</svg>\n")
