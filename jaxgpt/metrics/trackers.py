"""Experiment trackers: config, rows and samples of a run, also in Weights & Biases and MLflow.

`metrics.jsonl` does not depend on them. Each is fed by a thread of its own, so that a slow server
does not hold up the training; what it fails at is said once. The ids of their runs stay in the
workdir, so that a resumed run goes on in the same ones (rows that are repeated stand there twice):

    trackers.json   {"wandb": "k3v9x2ab", "mlflow": "5d0c61f0e3b94c0c8f1b6a0f7ce21d44"}

Their own settings hold: `WANDB_MODE`, `WANDB_PROJECT`, `MLFLOW_TRACKING_URI` and so on.
"""

import html
import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable
from functools import partial
from logging import WARNING, getLogger
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, Protocol, runtime_checkable

from etils import epath

from jaxgpt.config import Config
from jaxgpt.config.schema import fields_of, get_field
from jaxgpt.config.validate import parse_track
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput, described, one_line
from jaxgpt.system.extras import require
from jaxgpt.system.files import Missing, read_json, write_whole
from jaxgpt.system.stores import is_object_store

IDS = "trackers.json"
PROJECT = "jaxgpt"
PATIENCE = 30  # seconds in which a tracker must open, and at the end take what is left
MOST_PARAMS, LONGEST_PARAM = 100, 6000  # MLflow's limits for a batch, and for a value


class RunInfo(NamedTuple):
    """What a tracker is told when it opens: the config by field, and the id of its run in the
    workdir, "" for a new one."""

    workdir: epath.Path
    config: dict
    id: str


@runtime_checkable
class Tracker(Protocol):
    """One run in a tracker, opened by `TRACKERS[name](info)`; `where` tells people where it is."""

    id: str
    where: str

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Adds the values of a step."""

    def sample(self, step: int, text: str) -> None:
        """Adds a text."""

    def close(self, code: int) -> None:
        """Ends the run; `code` is the exit code."""


class Wandb:
    """A run in Weights & Biases; its local files are in the workdir, or in `$WANDB_DIR`."""

    def __init__(self, info: RunInfo):
        wandb = require("wandb", "track", "track=wandb")
        self.html = wandb.Html
        settings = wandb.Settings(console="off", silent=True, init_timeout=PATIENCE)
        folder = None if is_object_store(info.workdir) else os.fspath(info.workdir)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", info.workdir.name),
            dir=os.environ.get("WANDB_DIR", folder),
            id=info.id or secrets.token_hex(4),
            resume="allow",
            config=info.config,
            allow_val_change=True,
            settings=settings,
        )
        for names in ("train/*", "validation/*", "sample"):
            self.run.define_metric(names, step_metric="step")
        self.id = self.run.id
        self.where = f"offline, for wandb sync {os.path.dirname(self.run.dir)}"
        if not self.run.offline:
            self.where = self.run.url

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def sample(self, step: int, text: str) -> None:
        page = self.html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self.run.log({"step": step, "sample": page})

    def close(self, code: int) -> None:
        self.run.finish(exit_code=code)


class Mlflow:
    """A run in MLflow; without `$MLFLOW_TRACKING_URI` in `mlflow.db` in the workdir."""

    def __init__(self, info: RunInfo):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # not minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(PATIENCE // 3))
        mlflow = require("mlflow", "track", "track=mlflow")
        self.entities = require("mlflow.entities", "track", "track=mlflow")
        for library in ("mlflow", "alembic"):
            getLogger(library).setLevel(WARNING)
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            folder = os.path.abspath(info.workdir)
            uri, artifacts = f"sqlite:///{folder}/mlflow.db", f"{folder}/mlflow"
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        self.id = self._resumed(info.id) or self._new(info, artifacts)
        self.where = uri

    def _resumed(self, id_: str) -> str:
        """Returns the id if there is such a run, which goes on; else ''."""
        try:
            self.client.update_run(id_, status="RUNNING")
        except Exception:  # a new one is made, which also fails if the server is out of reach
            return ""
        return id_

    def _new(self, info: RunInfo, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = (
            found.experiment_id if found else self.client.create_experiment(name, artifacts)
        )
        id_ = self.client.create_run(experiment, run_name=info.workdir.name).info.run_id
        params = [
            self.entities.Param(field, str(value)[:LONGEST_PARAM])
            for field, value in info.config.items()
        ]
        for start in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(id_, params=params[start : start + MOST_PARAMS])
        return id_

    def metrics(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        points = [self.entities.Metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=points)

    def sample(self, step: int, text: str) -> None:
        self.client.log_text(self.id, text, f"samples/step_{step:08}.txt")

    def close(self, code: int) -> None:
        status = "FINISHED" if code == 0 else "KILLED" if code > 128 else "FAILED"
        self.client.set_terminated(self.id, status)


TRACKERS: dict[str, Callable[[RunInfo], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def check_trackers(track: str, workdir: epath.Path) -> None:
    """Raises `BadInput` if a tracker is unknown or not installed, or has no account or no place to
    write to."""
    names = parse_track(track)
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"track={track} needs {name}: pip install -e '.[track]'")
    if "mlflow" in names and is_object_store(workdir) and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise BadInput(f"track={track} with --workdir={workdir} needs $MLFLOW_TRACKING_URI")
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        wandb = require("wandb", "track", "track=wandb")
        if not wandb.login(prompt=False, verify=False):
            raise BadInput(
                "track=wandb: nobody is logged in: wandb login, or WANDB_API_KEY=KEY, or without an"
                " account WANDB_MODE=offline"
            )


class Feed:
    """Hands calls to one tracker, in their order, in a thread."""

    def __init__(self, name: str, tracker: Tracker):
        self.name, self.tracker = name, tracker
        self.calls, self.missed = SimpleQueue(), 0
        self.thread = Thread(target=self._work, name=f"track {name}", daemon=True)
        self.thread.start()

    def put(self, call: Callable[[], None]) -> None:
        """Has the thread call `call`."""
        self.calls.put(call)

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                call()
            except Exception as e:  # whatever it is, it is not worth the run
                if not self.missed:
                    why = one_line(described(e))[:300]
                    say(f"failed    {self.name}: {why}; training goes on, metrics.jsonl is whole")
                self.missed += 1

    def close(self, code: int) -> None:
        """Ends the tracker's run, after what is waiting; not longer than `PATIENCE`."""
        self.put(partial(self.tracker.close, code))
        self.calls.put(None)  # the end
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            say(f"failed    {self.name} takes too long; what it has not got is in metrics.jsonl")
        elif self.missed:
            say(f"failed    {self.name} lacks {self.missed} of the run's rows and samples")


class Trackers:
    """All trackers of a run, none without `track`."""

    def __init__(self, feeds: list[Feed] = ()):
        self.feeds = list(feeds)

    def metrics(self, split: str, step: int, values: dict[str, float]) -> None:
        """Adds the values of a step to every tracker, as `train/loss` and so on."""
        values = {f"{split}/{name}": value for name, value in values.items()}
        for feed in self.feeds:
            feed.put(partial(feed.tracker.metrics, step, values))

    def sample(self, step: int, text: str) -> None:
        """Adds a sample to every tracker."""
        for feed in self.feeds:
            feed.put(partial(feed.tracker.sample, step, text))

    def close(self, code: int) -> None:
        """Ends the trackers' runs; `code` is the exit code of this one."""
        for feed in self.feeds:
            feed.close(code)


def open_trackers(config: Config, workdir: epath.Path, is_resumed: bool) -> Trackers:
    """Returns the trackers of `config.track`, which go on in the runs whose ids are in the workdir.
    Raises `BadInput` if one cannot be opened; in a resumed run that is only said."""
    names, file = parse_track(config.track), workdir / IDS
    if not names:
        return Trackers()
    try:
        ids = read_json(file, {str: str}, "delete it to begin new runs in the trackers")
    except Missing:
        ids = {}
    fields, feeds = {path: get_field(config, path) for path in fields_of(config)}, []
    for name in names:
        try:
            tracker = TRACKERS[name](RunInfo(workdir, fields, ids.get(name, "")))
        except Exception as e:
            if not is_resumed:
                raise BadInput(f"track={name} cannot be opened: {described(e)}") from e
            why = one_line(described(e))[:300]
            say(f"failed    {name} cannot be opened: {why}; training goes on without it")
            continue
        say(f"track     {name} run {tracker.id}: {tracker.where}")
        ids[name] = tracker.id
        feeds.append(Feed(name, tracker))
    write_whole(file, json.dumps(ids))
    return Trackers(feeds)
