"""Compiled programs are found again, whatever became of their folder."""

import os
import subprocess
import sys

import pytest

from jaxgpt.system import programs

PROGRAM = """
import os, sys
from jaxgpt.system import programs
programs.keep_programs()
import jax, jax.numpy as jnp
from pathlib import Path

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
folder = Path(jax.config.jax_compilation_cache_dir)

def answer():
    jax.clear_caches()
    events.clear()
    assert jax.jit(lambda x: x * 6)(jnp.int32(7)) == 42
    return "cache_hits" in events

def entries():
    return [f for f in folder.rglob("*") if f.is_file()]

print(folder)
assert not answer() and entries()
assert answer()
for entry in entries():  # as a process leaves them that is killed while writing
    entry.write_bytes(entry.read_bytes()[:-9])
assert not answer()
assert answer()
programs.keep_no_programs()
assert jax.config.jax_compilation_cache_dir is None
"""


def test_programs_are_found_again_and_a_damaged_cache_is_made_anew(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in (programs.FOLDER, programs.MIN_SECONDS)}
    env |= {"JAXGPT_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith(str(tmp_path / "programs"))


@pytest.fixture
def unset(monkeypatch):
    for name in (programs.FOLDER, programs.MIN_SECONDS):
        monkeypatch.setenv(name, "")  # so that what `keep_programs` sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(programs.warnings, "showwarning", programs.warnings.showwarning)


def test_the_user_s_own_folder_is_left_alone(unset, monkeypatch, tmp_path):
    monkeypatch.setenv(programs.FOLDER, str(tmp_path / "mine"))
    programs.keep_programs()
    assert os.environ[programs.FOLDER] == str(tmp_path / "mine")
    assert not (tmp_path / "mine").exists() and not (tmp_path / "cache").exists()


def test_without_a_place_to_write_nothing_is_kept(unset, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "file"))
    programs.keep_programs()
    assert programs.FOLDER not in os.environ


def test_what_was_written_first_is_removed_first(tmp_path):
    for number, name in enumerate(["b", "a", "deep/c"]):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(10))
        os.utime(file, (number, number))
    programs.remove_oldest(tmp_path, 30)
    assert len([f for f in tmp_path.rglob("*") if f.is_file()]) == 3
    programs.remove_oldest(tmp_path, 25)
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == ["a", "c"]
    programs.remove_oldest(tmp_path, 9)
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]
