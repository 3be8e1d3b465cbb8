"""Small files: read with a schema, written whole, by any number of processes."""

import errno
import json
import multiprocessing
import os
import shutil
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jaxgpt.system import stores
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged, Missing, read_json, scratch_for, whole_folder, write_whole
from jaxgpt.text import files as text_files
from jaxgpt.text.files import hash_files

SCHEMA = {
    "format": int,
    "loss?": float | None,
    "pairs?": [(int, float)],
    "files": {str: {"bytes": int}},
}
GOOD = {"format": 1, "loss": None, "pairs": [[1, 2], [3, 4.5]], "files": {"é": {"bytes": 3}}}


def test_what_fits_the_schema_is_read(tmp_path):
    file = tmp_path / "f.json"
    for value in (GOOD, {"format": -1, "files": {}, "more": [[["anything"]]]}):
        write_whole(file, json.dumps(value))
        assert read_json(file, SCHEMA) == value
    write_whole(file, '"\\ud83d\\ude00"')
    assert read_json(file) == "😀", "a whole pair is a character"


BAD = [
    (b"", "not valid JSON"),
    (b'{"format": 1', "not valid JSON"),
    (b'{"format": 1}\0', "not valid JSON"),
    (b"\0" * 20, "not valid JSON"),
    (b'{"format": "\xff"}', "not UTF-8 (byte 12)"),
    (b"\xef\xbb\xbf{}", "not valid JSON"),
    (b"[" * 100_000, "nested more than 100 deep"),
    (b"[" * 150 + b"]" * 150, "nested more than 100 deep"),
    (b'{"a":' * 150 + b"1" + b"}" * 150, "nested more than 100 deep"),
    (b'"\\ud800"', "half of a surrogate pair"),
    (b'{"\\udfff": 1}', "half of a surrogate pair"),
    (b"1" * 5000, "not valid JSON"),
    (b'{"format": ' + b"9" * 30 + b', "files": {}}', "format is no number of 64 bits"),
    (b'{"format": 9223372036854775808, "files": {}}', "format is no number of 64 bits"),
    (b'{"format": 1, "loss": NaN, "files": {}}', "loss is no number of 64 bits"),
    (b'{"format": 1, "loss": 1e999, "files": {}}', "loss is no number of 64 bits"),
    (b"null", "it is null, not an object"),
    (b"[]", "it is a list, not an object"),
    (b'{"format": 1}', "it has no files"),
    (b'{"format": true, "files": {}}', "format is true or false, not an integer"),
    (b'{"format": 1.0, "files": {}}', "format is a number, not an integer"),
    (b'{"format": 1, "loss": "x", "files": {}}', "loss is a string, not a number or null"),
    (b'{"format": 1, "files": []}', "files is a list, not an object"),
    (b'{"format": 1, "files": {"a": 3}}', "files.a is an integer, not an object"),
    (b'{"format": 1, "files": {"a": {}}}', "files.a has no bytes"),
    (b'{"format": 1, "files": {}, "pairs": {}}', "pairs is an object, not a list"),
    (b'{"format": 1, "files": {}, "pairs": [[1, 2], [1]]}', "pairs[1] has 1 items, not 2"),
    (b'{"format": 1, "files": {}, "pairs": [[1, "x"]]}', "pairs[0][1] is a string, not a number"),
]


@pytest.mark.parametrize("raw, why", BAD, ids=[why for _, why in BAD])
def test_damage_is_one_error_that_names_the_file(tmp_path, raw, why):
    file = tmp_path / "f.json"
    file.write_bytes(raw)
    with pytest.raises(Damaged) as e:
        read_json(file, SCHEMA, "restore it")
    assert str(e.value).startswith(f"{file} is damaged: ") and str(e.value).endswith("; restore it")
    assert why in str(e.value) and "\n" not in str(e.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(Missing, match="is missing; train"):
        read_json(tmp_path / "none.json", SCHEMA, "train")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    for name in ("folder", "pipe", "loop"):
        with pytest.raises(Damaged, match=f"{name}.json is damaged: it "):
            read_json(tmp_path / f"{name}.json", SCHEMA)
    with pytest.raises(Damaged, match="File name too long"):
        read_json(tmp_path / ("x" * 300), SCHEMA)


def _write_often(path, barrier):
    barrier.wait()
    for i in range(200):
        write_whole(path, json.dumps([os.getpid(), i]))


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_several_writers_of_one_file(tmp_path, kind):
    fork = multiprocessing.get_context("fork")
    if kind == "processes":
        make, barrier = fork.Process, fork.Barrier(4)
    else:
        make, barrier, faults = threading.Thread, threading.Barrier(4), []
        hook, threading.excepthook = threading.excepthook, faults.append
    workers = [make(target=_write_often, args=(tmp_path / "f.json", barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if kind == "processes":
        assert [worker.exitcode for worker in workers] == [0] * 4
    else:
        threading.excepthook = hook
        assert not faults
    assert read_json(tmp_path / "f.json", (int, int))[1] == 199
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def _hash_often(files, memory, barrier):
    barrier.wait()
    for _ in range(50):
        for file in files:
            hash_files([str(file)], memory)


def test_several_processes_that_share_a_cache_of_hashes(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "REMEMBERED", 1)
    monkeypatch.setattr(text_files, "RACY_SECONDS", 0)  # what is as new as now is not remembered
    fork, memory = multiprocessing.get_context("fork"), tmp_path / "cache" / "digests.json"
    barrier, workers, files = fork.Barrier(4), [], {}
    for i in range(4):
        own = [tmp_path / f"{i}-{k}.txt" for k in range(5)]
        for file in own:
            file.write_text(file.name)
            files[str(file)] = hash_files([str(file)], tmp_path / "none.json")
        workers.append(fork.Process(target=_hash_often, args=(own, memory, barrier)))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [path.name for path in memory.parent.iterdir()] == ["digests.json"]
    assert {file: hash_files([file], memory) for file in files} == files


def _dead_process() -> int:
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    return child.pid


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    file, folder = tmp_path / "f.json", tmp_path / "w"
    for target in (file, folder):
        mine = f"{os.getpid()}."
        for process in (_dead_process(), os.getppid()):
            left = scratch_for(target).with_name(
                scratch_for(target).name.replace(mine, f"{process}.", 1)
            )
            left.mkdir() if target == folder else left.write_text("half")
            (left / "part").write_text("half") if target == folder else None
    elsewhere = tmp_path / ".f.json.another-host.1.1.tmp"
    elsewhere.write_text("half")
    assert len(list(tmp_path.iterdir())) == 5
    write_whole(file, "{}")
    with whole_folder(folder, "--to") as scratch:
        (scratch / "file").write_text("whole")
    left = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("."))
    assert len(left) == 3 and elsewhere.name in left, "only the living ones' are left"
    assert all(f".{os.getppid()}." in name for name in left if name != elsewhere.name)
    assert (folder / "file").read_text() == "whole"


def test_a_folder_cut_short_by_a_process_of_the_same_number(tmp_path):
    """In a container every process may be the first one."""
    scratch = scratch_for(tmp_path / "w")
    scratch.mkdir()
    (scratch / "half").write_text("")
    with whole_folder(tmp_path / "w", "--to") as made:
        assert made == scratch and not list(made.iterdir())
    assert (tmp_path / "w").is_dir()


def test_a_thread_that_still_writes_does_not_keep_a_scratch_folder(tmp_path, monkeypatch):
    """As Orbax's do after a save that failed: the folder is not empty when it is to be removed."""
    rmtree, failures = shutil.rmtree, [OSError(errno.ENOTEMPTY, "not empty")] * 2

    def busy(path, ignore_errors=False, **more):
        if not failures:
            return rmtree(path, ignore_errors, **more)
        failure = failures.pop()
        if not ignore_errors:
            raise failure

    monkeypatch.setattr(shutil, "rmtree", busy)
    with pytest.raises(BadInput, match="cannot write"):
        with whole_folder(tmp_path / "f", "--to"):
            raise OSError("full")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file/f.json", tmp_path / "no/f.json", tmp_path / ("x" * 300)):
        with pytest.raises(BadInput, match="cannot write"):
            write_whole(path, "{}")
    for path in (tmp_path / "file/w", tmp_path / ("x" * 300)):
        with pytest.raises(BadInput, match="cannot write"), whole_folder(path, "--to"):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write_whole(tmp_path / ("x" * 255), "a name as long as may be")


def test_a_file_on_a_store_is_read_as_of_one_moment(monkeypatch):
    """By a store whose file becomes another one after each question about it."""

    class Replaced(MemoryFileSystem):
        contents = iter((b"x" * 9, b"", b'{"format": 1}'))

        def info(self, path, **kwargs):
            self.pipe_file(path, next(self.contents))
            return super().info(path, **kwargs)

    store = Replaced()
    store.pipe_file("/f.json", b'{"format": 7}')
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (store, "/f.json"))
    assert stores.read_bytes("memory://f.json") == b'{"format": 7}'
