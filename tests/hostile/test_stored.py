"""What a run stored, damaged in any way, is named or left out; no reader does anything else."""

import itertools
import json

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.checkpointing import choice, manifest
from jaxgpt.config import Config
from jaxgpt.config.stored import to_json
from jaxgpt.metrics.rows import METRICS, SAMPLES, RowFile, read_rows
from jaxgpt.reports import gather
from jaxgpt.training.end import read_end, record_end
from tests.hostile.conftest import FUZZ, mutated, refused

MANY = settings(FUZZ, max_examples=200)
META = {
    "tokens": 192,
    "seconds": 1.5,
    "validation_loss": 2.5,
    "validations": [[4, 3.5], [8, 2.5]],
    "skips": [[3, 2]],
    "rollbacks": 1,
    "data_fingerprint": "0f",
    "config": {"early_stop": 2, "num_steps": 8},
    "versions": {"jax": "0.10.2"},
}
TRAIN = {"step": 4, "split": "train", "loss": 2.5, "seconds": 0.5, "tokens": 192, "mfu": None}
VALIDATION = {"step": 4, "split": "validation", "loss": 2.5, "seconds": 0.5, "bits_per_byte": 1.5}
ROWS = b"".join(
    json.dumps(row | {"step": step}).encode() + b"\n"
    for step in (4, 8)
    for row in (TRAIN, VALIDATION)
)
SAMPLE = json.dumps({"step": 4, "prompt": "", "text": "a\u2028b"}, ensure_ascii=False).encode()


@pytest.fixture
def checkpoint(tmp_path):
    """A folder that looks like a checkpoint of step 8 from outside."""
    folder = epath.Path(tmp_path) / "checkpoints/8"
    for name in ("state/a/0.0", "state/b/0", "meta/metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(np.random.default_rng(0).bytes(40))
    (folder / "meta/metadata").write_text(json.dumps(META))
    manifest.write_manifest(folder)
    return folder


def test_manifest(checkpoint):
    file = checkpoint / manifest.MANIFEST
    whole = file.read_bytes()
    entries = json.loads(whole)["files"]
    assert not manifest.damage(checkpoint) and manifest.size_of(checkpoint) > 80

    @MANY
    @given(mutated(whole))
    def check(raw):
        file.write_bytes(raw)
        fault = manifest.damage(checkpoint)
        assert isinstance(fault, str) and "\n" not in fault
        if not fault:  # then it says of these files what is so
            kept = json.loads(raw)["files"]
            assert all(entries[name] == entry for name, entry in kept.items())
            manifest.size_of(checkpoint)

    check()


def test_every_flipped_bit_of_a_manifest(checkpoint):
    file = checkpoint / manifest.MANIFEST
    whole = file.read_bytes()
    harmless = {json.dumps(json.loads(whole)["files"])}
    for at, bit in itertools.product(range(len(whole)), range(8)):
        raw = bytearray(whole)
        raw[at] ^= 1 << bit
        file.write_bytes(raw)
        if not manifest.damage(checkpoint):
            assert json.dumps(json.loads(raw)["files"]) in harmless, raw


@pytest.mark.parametrize(
    "name", ["/dev/zero", "state/../../../etc/passwd", "a\0b", "x" * 300, "state", "\n", ""]
)
def test_a_manifest_reads_no_file_but_the_checkpoint_s(checkpoint, name):
    entries = {name: {"bytes": 1, "crc32": 1}}
    (checkpoint / manifest.MANIFEST).write_text(json.dumps({"format": 1, "files": entries}))
    assert manifest.damage(checkpoint)


def test_meta(checkpoint):
    file = checkpoint / "meta/metadata"

    @MANY
    @given(mutated(file.read_bytes()))
    def check(raw):
        file.write_bytes(raw)
        assert manifest.damage(checkpoint) or raw == json.dumps(META).encode()
        loss = choice.loss_of(checkpoint)
        assert loss is None or np.isfinite(loss)
        if not refused(choice.read_meta, checkpoint):
            choice.has_stopped_early(choice.read_meta(checkpoint))

    check()


def test_rows(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    (tmp_path / "config.json").write_text(to_json(Config()))

    @MANY
    @given(mutated(ROWS), st.integers(0, 9))
    def check(raw, last_step):
        file.write_bytes(raw)
        rows = read_rows(file, METRICS)
        refused(gather.gather, str(tmp_path))
        RowFile(file, last_step, METRICS).close()
        assert read_rows(file, METRICS) == [row for row in rows if row["step"] <= last_step]
        assert all(line in raw for line in file.read_bytes().split(b"\n"))
        assert "Traceback" not in capsys.readouterr().err

    check()


def test_samples(tmp_path):
    file = tmp_path / "samples.jsonl"

    @MANY
    @given(mutated(SAMPLE + b"\n" + SAMPLE + b"\n"))
    def check(raw):
        file.write_bytes(raw)
        for row in read_rows(file, SAMPLES):
            assert isinstance(row["text"], str)

    check()


def test_the_end(tmp_path):
    folder = epath.Path(tmp_path)
    record_end(folder, 8, "early_stop")

    @MANY
    @given(mutated((folder / "end.json").read_bytes()))
    def check(raw):
        (folder / "end.json").write_bytes(raw)
        refused(read_end, folder)

    check()
