"""The training loop. At a step's end, in this order: row, validation, sample, checkpoint.

So a checkpoint never precedes its rows, and a resume that cuts the rows behind it leaves each
step once. A stop signal saves at the end of its step, without validation or sample: whoever sent
it may not wait.
"""

import dataclasses
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version

import jax
from jax.sharding import Mesh

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.checkpointing.choice import best_of, is_out_of_patience
from jaxgpt.config import Config
from jaxgpt.config.stored import as_stored
from jaxgpt.data.pipeline import Stream, device_batches
from jaxgpt.data.prepare import Data
from jaxgpt.metrics.progress import duration, train_line, validation_line
from jaxgpt.metrics.rows import Reporter, named_numbers
from jaxgpt.parameters.flops import mfu
from jaxgpt.processes import hosts
from jaxgpt.processes.stop import StopRequest
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.training.divergence import Diverged, Spikes, batch_of
from jaxgpt.training.setup import Training
from jaxgpt.training.state import TrainState

DIVERGED = 3  # the exit code of a run that diverged and could not recover
WORST = 1e30  # stands for a validation loss that is not finite: JSON has no infinity


@dataclasses.dataclass
class History:
    """What a run has done so far, over resumes; saved with each checkpoint.

    `seconds` is training time up to the last restore, `tokens` counts targets, `validations` are
    (step, loss), `skips` the batches that were left out (see `batch_of`).
    """

    seconds: float = 0.0
    tokens: int = 0
    validations: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    skips: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    rollbacks: int = 0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def training_seconds(self) -> float:
        """Returns the training time up to now."""
        return self.seconds + time.perf_counter() - self.started

    @property
    def best(self) -> tuple[int, float]:
        """The (step, loss) of the lowest validation loss, the earliest of equals."""
        return best_of(self.validations)

    def to_meta(self) -> dict:
        """Returns what `from_meta` reads."""
        meta = dataclasses.asdict(self) | {"seconds": self.training_seconds()}
        return {name: value for name, value in meta.items() if name != "started"}

    @classmethod
    def from_meta(cls, meta: dict) -> "History":
        """Returns the history in a checkpoint's meta; checkpoints of old hold less."""
        pairs = {
            name: [tuple(pair) for pair in meta.get(name, [])] for name in ("validations", "skips")
        }
        rest = {name: meta[name] for name in ("tokens", "seconds", "rollbacks") if name in meta}
        return cls(**rest, **pairs)

    def is_out_of_patience(self, patience: int) -> bool:
        """Says whether the last `patience` validations (0: never) brought no better loss."""
        return is_out_of_patience(self.validations, patience)


def restore_or_init(
    run: Training, data: Data, checkpoints: Checkpoints
) -> tuple[TrainState, History]:
    """Returns the newest checkpoint's state, else a fresh one. Raises `BadInput` if the checkpoint
    was trained on another token stream."""
    step = checkpoints.newest_whole()
    if step is None:
        return run.first_state(), History()
    state, meta = checkpoints.restore(step, run.abstract_state())
    if meta.get("data_fingerprint") != data.fingerprint:
        raise BadInput(
            f"the text of data.source={run.config.data.source} or its tokenizer has changed"
            f" since checkpoint {step}; restore it, or choose another --workdir"
        )
    run.companions.check_reference(meta.get("companions", {}), step)
    return state, History.from_meta(meta)


@dataclasses.dataclass
class Loop:
    """The part of a run that repeats: `loop(state) -> exit code`."""

    run: Training
    data: Data
    stream: Stream
    evaluate: Callable  # both: see `objectives.companions`
    sample: Callable
    train_step: Callable
    checkpoints: Checkpoints
    report: Reporter
    history: History = dataclasses.field(default_factory=History)
    last_validation: dict | None = None
    spikes: Spikes = dataclasses.field(default_factory=Spikes)
    # the step and the time from which seconds per step count: evaluation and saving are left out
    timed_from: tuple[int, float] = (0, 0.0)

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.run.config

    def __call__(self, state: TrainState) -> int:
        """Trains from `state` to `num_steps`, to a stop signal on any process or until early
        stopping; returns the exit code."""
        config = self.config
        step, batches, vote = self._start_after(int(state.step))
        pending = None  # a row waits until the next step is dispatched, so the device never does
        ended, signal = False, 0  # by early stopping, by a signal
        hosts.meet()  # from here on a signal is one to all; before, it ends the process at once
        with StopRequest() as stop:
            while step < config.num_steps and not ended and not signal:
                step += 1
                state, metrics = self.train_step(state, next(batches))
                self.history.tokens += self.stream.num_targets(batch_of(step, self.history.skips))
                end, signal = step == config.num_steps, vote(stop.received)
                validates = (end or _due(step, config.eval_every)) and not signal
                samples = (end or _due(step, config.sample_every)) and not signal
                saves = end or _due(step, config.checkpoint_every) or signal > 0
                try:
                    if pending:
                        self._log(*pending)
                    is_due = end or _due(step, config.log_every)
                    pending = (step, self.history.tokens, metrics) if is_due else None
                    if pending and (validates or samples or saves):
                        self._log(*pending)
                        pending = None
                except Diverged as diverged:
                    if self.history.rollbacks == config.max_rollbacks:
                        self._give_up(diverged)
                        self.checkpoints.close()
                        return DIVERGED
                    state = self._roll_back(diverged)
                    step, batches, vote = self._start_after(int(state.step))
                    pending, signal = None, 0
                    continue
                if validates:
                    with survived("validation", step):
                        self._validate(state, step)
                    ended = self.history.is_out_of_patience(config.early_stop)
                    is_best = config.early_stop > 0 and self.history.best[0] == step
                    saves = saves or ended or is_best
                if samples:
                    with survived("sample", step):
                        self._sample(state, step)
                if saves:
                    self._save(state, step)
                if validates or samples or saves:
                    self.timed_from = step, time.perf_counter()
            self.checkpoints.close()
        if not signal:
            return 0
        say(f"stopped   by signal {signal} after step {step}, which is saved")
        return 128 + signal

    def _start_after(self, step: int) -> tuple[int, Iterator[dict], hosts.Vote]:
        """Returns `step`, the batches behind it, on the devices, and a new vote."""
        self.history.started = time.perf_counter()
        self.timed_from = step, time.perf_counter()
        batches = device_batches(
            self.stream,
            self.run.batch_sharding,
            step,
            self.config.num_steps,
            partial(batch_of, skips=self.history.skips),
        )
        return step, batches, hosts.Vote(self.run.mesh)

    def _roll_back(self, diverged: Diverged) -> TrainState:
        """Returns the newest whole checkpoint's state, the bad batches left out of what follows."""
        state, earlier = restore_or_init(self.run, self.data, self.checkpoints)
        restored, last = int(state.step), diverged.step
        first = max(last - diverged.in_a_row + 1, restored + 1)
        self.report.rewind(restored)
        say(
            f"diverged  {diverged.in_a_row} non-finite steps in a row up to step {last}: back to"
            f" checkpoint {restored}, without {self._batches(diverged)}"
        )
        earlier.skips = [*self.history.skips, (first, last - first + 1)]
        earlier.seconds = self.history.training_seconds()
        earlier.rollbacks = self.history.rollbacks + 1
        self.history = earlier
        return state

    def _give_up(self, diverged: Diverged) -> None:
        say(
            f"diverged  {diverged.in_a_row} non-finite steps in a row up to step {diverged.step},"
            f" after {self.history.rollbacks} rollbacks: giving up. The last of them took"
            f" {self._batches(diverged)}; look at one with python -m jaxgpt.prepare --config=FILE"
            f" --show={batch_of(diverged.step, self.history.skips)}, or lower optim.learning_rate"
        )

    def _batches(self, diverged: Diverged) -> str:
        steps = range(diverged.step - diverged.in_a_row + 1, diverged.step + 1)
        return f"batches {', '.join(str(batch_of(s, self.history.skips)) for s in steps)}"

    def _log(self, step: int, tokens: int, metrics: dict) -> None:
        values = named_numbers(jax.device_get(metrics))
        in_a_row, skipped = values.pop("in_a_row"), values.pop("skipped")
        first, began = self.timed_from
        self.timed_from = step, time.perf_counter()
        step_seconds = (self.timed_from[1] - began) / max(step - first, 1)
        per_step = self.config.batch_size * self.config.model.max_seq_len
        devices = self.run.mesh.devices
        row = {
            "step": step,
            "split": "train",
            "loss": _finite(values["loss"]),
            "learning_rate": values["learning_rate"],
            "grad_norm": _finite(values["grad_norm"]),
            "tokens": tokens,
            "tokens_per_second": per_step / step_seconds,
            "step_seconds": step_seconds,
            "mfu": mfu(
                per_step * self.run.flops_per_token / step_seconds,
                devices.flat[0].device_kind,
                devices.size,
            ),
            "seconds": self.history.training_seconds(),
        }
        row |= {name: _finite(v) for name, v in values.items() if name not in row}
        self.report.metrics(row)
        eta = (self.config.num_steps - step) * step_seconds
        if self.report.active:
            say(train_line(row, self.config.num_steps, eta))
        batch = batch_of(step, self.history.skips)
        if in_a_row:
            say(
                f"skipped   step {step} (batch {batch}): loss or gradient not finite,"
                f" {in_a_row:.0f} in a row, {skipped:.0f} in all"
            )
        elif usual := self.spikes(values["loss"]):
            say(
                f"spike     loss {values['loss']:.4f} at step {step} (batch {batch}), usually"
                f" {usual:.4f}"
            )
        if in_a_row >= self.config.max_bad_steps:
            raise Diverged(step, int(in_a_row))

    def _validate(self, state: TrainState, step: int) -> None:
        jax.block_until_ready(state.step)  # steps still under way are not the evaluation's time
        began = time.perf_counter()
        windows = self.config.eval_batches * self.config.batch_size  # whatever grad_accum is
        figures = self.evaluate(state.best_params, windows)
        row = {"step": step, "split": "validation"}
        row |= {name: _finite(v) for name, v in figures.items() if isinstance(v, float | None)}
        row["seconds"] = self.history.training_seconds()
        self.report.metrics(row)
        self.last_validation = row
        self.history.validations.append((step, WORST if row["loss"] is None else row["loss"]))
        if self.report.active:
            line = validation_line(row, self.config.num_steps)
            say(f"{line} | took {duration(time.perf_counter() - began)}")

    def _sample(self, state: TrainState, step: int) -> None:
        if text := self.sample(state.best_params, step):
            self.report.sample({"step": step, "prompt": self.sample.prompt, "text": text})
            if self.report.active:
                body = (self.sample.prompt + text).strip("\n")
                say(f"--- sample at step {step} ---\n{body}\n---")

    def _save(self, state: TrainState, step: int) -> None:
        meta = {
            **self.history.to_meta(),
            "data_fingerprint": self.data.fingerprint,
            "companions": self.run.companions.reference,
            "seed": self.config.seed,
            "config": as_stored(self.config),
            "versions": {
                name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")
            },
            "environment": environment(self.run.mesh),
            "data": self.data.summary,
        }
        loss = dict(self.history.validations).get(step)
        self.report.sync()
        self.checkpoints.save(step, state, meta, loss)


@contextmanager
def survived(what: str, step: int) -> Iterator[None]:
    """Turns an error into one line: neither a sample nor a validation is worth the run.

    Bad input (a full disk) still ends it. So does any error with several processes: the others may
    be waiting inside the computation that failed here.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as e:
        if jax.process_count() > 1:
            raise
        why = (str(e).strip().splitlines() or [""])[0][:300]
        say(f"failed    {what} at step {step}: {type(e).__name__}: {why}; training goes on")


def environment(mesh: Mesh) -> dict:
    """Returns where a run runs, for people."""
    devices = mesh.devices
    return {
        "devices": f"{devices.size} x {devices.flat[0].device_kind}",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "jaxgpt": version("jaxgpt"),
    }


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN and no infinity: they become null."""
    return None if value is None or not math.isfinite(value) else value


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
