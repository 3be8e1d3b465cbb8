"""Experiment trackers: what they are told, what their faults may do, and the real ones offline."""

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from jaxgpt import train
from jaxgpt.config import Config
from jaxgpt.config.validate import TRACKERS as NAMES
from jaxgpt.config.validate import validate
from jaxgpt.metrics import trackers
from jaxgpt.metrics.rows import Reporter
from jaxgpt.metrics.trackers import TRACKERS, check_trackers, open_trackers
from jaxgpt.system.errors import BadInput
from tests.conftest import config_flag

ROWS = [
    {"step": 1, "split": "train", "loss": 3.5, "mfu": None, "seconds": 1.0},
    {"step": 1, "split": "validation", "loss": 3.25, "perplexity": 25.8, "seconds": 1.5},
]


class Recorder:
    """A tracker that keeps what it is told; breaks at what `breaks` names."""

    breaks, told = "", []

    def __init__(self, info):
        self.id, self.where = info.id or "new", "here"
        self._tell("open", info.id, info.config["model.num_layers"])

    def _tell(self, what, *args):
        self.told.append((what, *args))
        if what == self.breaks:
            raise ConnectionError(f"no {what}\nmore")

    def metrics(self, step, values):
        self._tell("metrics", step, values)

    def sample(self, step, text):
        self._tell("sample", step, text)

    def close(self, code):
        self._tell("close", code)


def recorder(monkeypatch, name="wandb", breaks=""):
    kind = type("Fake", (Recorder,), {"breaks": breaks, "told": []})
    monkeypatch.setitem(TRACKERS, name, kind)
    return kind.told


def report(tmp_path, track, code=0, is_resumed=False) -> None:
    """A run of two rows and a sample."""
    workdir = epath.Path(tmp_path)
    opened = open_trackers(Config(track=track), workdir, is_resumed)
    reporter = Reporter(workdir, 0, True, opened)
    for row in ROWS:
        reporter.metrics(row)
    reporter.sample({"step": 2, "prompt": "Once", "text": " upon"})
    reporter.close()
    opened.close(code)


def test_a_tracker_is_told_config_rows_and_samples(tmp_path, monkeypatch, capsys):
    told = recorder(monkeypatch)
    report(tmp_path, "wandb", code=143)
    assert told == [
        ("open", "", 12),
        ("metrics", 1, {"train/loss": 3.5}),
        ("metrics", 1, {"validation/loss": 3.25, "validation/perplexity": 25.8}),
        ("sample", 2, "Once upon"),
        ("close", 143),
    ]
    assert "track     wandb run new: here" in capsys.readouterr().err
    report(tmp_path, "wandb", is_resumed=True)
    assert told[5] == ("open", "new", 12), "the same run goes on"
    (tmp_path / "trackers.json").write_text('{"wandb": 3}')
    with pytest.raises(BadInput, match="trackers.json is damaged.*delete it to begin new runs"):
        report(tmp_path, "wandb")


@pytest.mark.parametrize("breaks", ["metrics", "sample", "close"])
def test_a_tracker_that_fails_is_one_line_and_ends_nothing(tmp_path, monkeypatch, capsys, breaks):
    told, other = recorder(monkeypatch, breaks=breaks), recorder(monkeypatch, "mlflow")
    for folder in ("w", "alone"):
        (tmp_path / folder).mkdir()
    report(tmp_path / "w", "wandb,mlflow")
    assert [what for what, *_ in told] == [what for what, *_ in other], "it is asked again"
    err = capsys.readouterr().err
    assert err.count(f"failed    wandb: ConnectionError: no {breaks} more; training goes on") == 1
    count = 2 if breaks == "metrics" else 1
    assert f"failed    wandb lacks {count} of the run's rows and samples" in err
    assert err.count("\n") == 4
    report(tmp_path / "alone", "")
    one, two = ((tmp_path / w / "metrics.jsonl").read_text() for w in ("w", "alone"))
    assert one == two == "".join(json.dumps(row) + "\n" for row in ROWS)


def test_a_slow_tracker_is_left_behind(tmp_path, monkeypatch, capsys):
    hung = trackers.SimpleQueue()
    recorder(monkeypatch)
    monkeypatch.setattr(TRACKERS["wandb"], "metrics", lambda *args: hung.get())
    monkeypatch.setattr(trackers, "PATIENCE", 0.05)
    report(tmp_path, "wandb")
    assert "failed    wandb takes too long; what it has not got is in" in capsys.readouterr().err
    hung.put(None)
    hung.put(None)


def test_a_tracker_that_does_not_open(tmp_path, monkeypatch, capsys):
    """A new run is refused; one that goes on, by itself at night, is worth more than its curves."""
    recorder(monkeypatch, breaks="open")
    with pytest.raises(BadInput, match="track=wandb cannot be opened: ConnectionError: no open mo"):
        report(tmp_path, "wandb")
    report(tmp_path, "wandb", is_resumed=True)
    assert "failed    wandb cannot be opened: ConnectionError: no open" in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_what_is_missing_is_said_before_anything_else(command, tmp_path, monkeypatch):
    assert set(TRACKERS) == set(NAMES)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in NAMES else found(name)
    )
    for track, message in (
        ("mlflow", "track=mlflow needs mlflow: pip install -e '.[track]'"),
        ("wandb,mlflow", "track=wandb,mlflow needs wandb: pip install"),
        ("aim", "track='aim': 'aim' is none of wandb, mlflow"),
    ):
        flags = ("--config=tiny", f"--workdir={tmp_path}/w", f"--config.track={track}")
        code, _, err = command(train.main, *flags)
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "w").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(BadInput, match=r"--workdir=gs://bucket/run needs \$MLFLOW_TRACKING_URI"):
        check_trackers("mlflow", epath.Path("gs://bucket/run"))
    with pytest.raises(BadInput, match="'x' is none of"):
        validate(Config(track="wandb, x"))


def test_nobody_who_does_not_track_imports_them():
    program = "import sys, jaxgpt.metrics.rows; print({'wandb', 'mlflow'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program]).decode() == "set()\n"


def wandb_records(workdir: Path) -> list:
    """The records of all offline runs, in order: protocol buffers in LevelDB's log format, blocks
    of 32 KiB with (checksum, length, kind) before each fragment."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        raw, at, part = file.read_bytes(), 7, b""
        while at + 7 <= len(raw):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, size, kind = struct.unpack("<IHB", raw[at : at + 7])
            part, at = part + raw[at + 7 : at + 7 + size], at + 7 + size
            if kind in (1, 4):  # whole, or the last fragment
                found.append(Record.FromString(part))
                part = b""
    return found


@pytest.mark.track
def test_the_real_trackers_offline_and_over_a_resume(command, tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    flag = config_flag(
        tmp_path,
        "batch_size=8, log_every=1, eval_every=2, checkpoint_every=2, track='mlflow,wandb',"
        " model=ModelConfig(num_layers=1, num_heads=2, embed_dim=16, max_seq_len=16),"
        " sample=SampleConfig(prompt='<b>', max_new_tokens=4),"
        f" data=DataConfig(source='text:{corpus}')",
    )
    ids = []
    for steps in (2, 4):
        code, _, err = command(train.main, flag, "--workdir=w", f"--config.num_steps={steps}")
        assert code == 0 and "failed" not in err, err
        ids.append(json.loads((tmp_path / "w/trackers.json").read_text()))
    assert ids[0] == ids[1]
    rows = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (tmp_path / "w/samples.jsonl").read_text().splitlines()]
    wanted = {
        (f"{row['split']}/{name}", row["step"]): row[name]
        for row in rows
        for name in ("loss", "learning_rate", "grad_norm", "perplexity")
        if name in row
    }
    assert len(wanted) == 4 * 3 + 2 * 2 and len(samples) == 2

    records = wandb_records(tmp_path / "w")
    runs = [record.run for record in records if record.run.run_id]
    assert {run.run_id for run in runs} == {ids[0]["wandb"]} and len(runs) >= 2
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["model.embed_dim"] == 16 and config["batch_size"] == 8
    seen = {}
    for record in records:
        items = {tuple(i.nested_key) or (i.key,): i.value_json for i in record.history.item}
        step = int(items.get(("step",), 0))
        seen |= {(name[0], step): json.loads(value) for name, value in items.items()}
    assert {key: seen.get(key) for key in wanted} == pytest.approx(wanted, rel=1e-12)
    pages = [
        p.read_text() for p in sorted((tmp_path / "w/wandb").glob("offline*/files/media/html/*"))
    ]
    assert len(pages) == 2 and all("<pre>&lt;b&gt;" in page for page in pages)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0, 0]

    from mlflow import MlflowClient

    client, run = MlflowClient(f"sqlite:///{tmp_path}/w/mlflow.db"), ids[0]["mlflow"]
    for name in {name for name, _ in wanted}:
        history = {point.step: point.value for point in client.get_metric_history(run, name)}
        assert history == pytest.approx({s: v for (n, s), v in wanted.items() if n == name})
    info = client.get_run(run)
    assert info.data.params["model.embed_dim"] == "16" and info.info.status == "FINISHED"
    files = sorted((tmp_path / "w/mlflow").rglob("step_*.txt"))
    assert [file.read_text() for file in files] == [s["prompt"] + s["text"] for s in samples]


@pytest.mark.track
def test_the_real_trackers_without_account_or_server(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    flags = ("--config=tiny", f"--workdir={tmp_path}/w", "--config.track=wandb")
    code, _, err = command(train.main, *flags)
    assert code == 2 and "track=wandb: nobody is logged in: wandb login" in err, err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="track=mlflow cannot be opened: .*127.0.0.1"):
        open_trackers(Config(track="mlflow"), epath.Path(tmp_path), False)
