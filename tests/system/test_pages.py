"""Huge pages: a plain command gets them, and nothing breaks where there are none."""

import importlib.machinery
import os
import subprocess
import sys

import pytest

from jaxgpt.system import pages

CONFIG = """
import os, resource
from jaxgpt.config import *
from jaxgpt.metrics.rows import Reporter

def metrics(self, row):
    print(os.getpid(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
Reporter.metrics = metrics

def get_config():
    return Config(
        num_steps=10, log_every=5, batch_size=16, eval_every=0, checkpoint_every=0, eval_batches=1,
        model=ModelConfig(max_seq_len=256, num_layers=2, num_heads=4, embed_dim=64),
        data=DataConfig(source="text:{0}/*.txt", cache_dir="{0}/cache"),
        sample=SampleConfig(max_new_tokens=0),
    )
"""


@pytest.mark.slow
def test_a_plain_command_faults_its_memory_in_as_huge_pages(tmp_path):
    if not pages._on_request():
        pytest.skip("huge pages are not given on request here")
    (tmp_path / "c.py").write_text(CONFIG.format(tmp_path))
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question.\n" * 2000)
    faults = {}
    # On one device: the temporaries of each of the tests' eight are too small to be given back
    for tunables in ("", "glibc.malloc.hugetlb=0"):  # the user's own tunables are left alone
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jaxgpt.train", f"--config={tmp_path}/c.py"),
                f"--workdir={tmp_path}/run{len(tunables)}",
            ],
            env={k: v for k, v in os.environ.items() if k not in (pages.TUNABLES, "XLA_FLAGS")}
            | ({pages.TUNABLES: tunables} if tunables else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        out, err = process.communicate()
        assert process.returncode == 0, err
        (pid, at_5), (_, at_10) = (map(int, line.split()) for line in out.splitlines()[:2])
        assert pid == process.pid
        faults[tunables] = at_10 - at_5
    assert faults["glibc.malloc.hugetlb=0"] > 5 * faults[""], faults


@pytest.fixture
def started(monkeypatch):
    """What `use_huge_pages` starts, where everything is in favour of it."""
    calls = []
    monkeypatch.delenv(pages.TUNABLES, raising=False)
    monkeypatch.setattr(os, "execve", lambda *args: calls.append(args))
    monkeypatch.setattr(pages, "_is_command", lambda: True)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    return calls


@pytest.mark.parametrize(
    "mode", ["always [madvise] never", "[always] madvise never", "always madvise [never]", None]
)
def test_only_where_huge_pages_are_given_on_request(started, mode, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "HUGE_PAGES", tmp_path / "enabled")
    if mode:
        (tmp_path / "enabled").write_text(f"{mode}\n")
    pages.use_huge_pages()
    if mode != "always [madvise] never":
        assert not started
        return
    ((program, arguments, environment),) = started
    assert program == sys.executable and arguments == [sys.executable, *sys.orig_argv[1:]]
    assert environment == os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def _no_name(name):
    raise ValueError("unrecognized configuration name")


@pytest.mark.parametrize("libc", [lambda name: None, _no_name, lambda name: "glibc 2.31"])
def test_other_c_libraries_are_left_alone(started, libc, tmp_path, monkeypatch):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(pages, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(os, "confstr", libc)
    pages.use_huge_pages()
    assert not started


def test_a_command_goes_on_where_it_cannot_be_started_again(started, tmp_path, monkeypatch):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(pages, "HUGE_PAGES", tmp_path / "enabled")

    def refuse(*args):
        raise OSError("Argument list too long")

    monkeypatch.setattr(os, "execve", refuse)
    pages.use_huge_pages()


@pytest.mark.parametrize(
    ("spec", "arguments", "expected"),
    [
        ("jaxgpt.train", ["python", "-m", "jaxgpt.train", "--config=tiny"], True),
        ("jaxgpt.__main__", ["python", "-X", "dev", "-m", "jaxgpt", "train"], True),
        (None, ["python", "/usr/bin/jaxgpt", "train"], True),
        (None, ["python", "-c", "run()", "-m", "jaxgpt.train"], False),
        (None, ["python", "tool.py"], False),
        ("pytest.__main__", ["python", "-m", "pytest", "-m", "jaxgpt.train"], False),
        ("jaxgpt.train", ["python", "-m", "pdb", "-m", "jaxgpt.train"], False),
    ],
)
def test_what_is_started_again_is_a_command_of_ours(spec, arguments, expected, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", arguments)
    monkeypatch.setattr(sys, "argv", arguments[1:])
    spec = spec and importlib.machinery.ModuleSpec(spec, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert pages._is_command() is expected
