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
from jaxgpt.config.stored import as_stored
from jaxgpt.data.pipeline import device_batches, training_stream
from jaxgpt.data.prepare import Prepared
from jaxgpt.evaluation.perplexity import Perplexity
from jaxgpt.inference.training_sample import TrainingSample
from jaxgpt.metrics.progress import duration, train_line, validation_line
from jaxgpt.metrics.rows import Reporter
from jaxgpt.model.flops import mfu
from jaxgpt.processes import hosts
from jaxgpt.processes.stop import StopRequest
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.training.divergence import Diverged, Spikes, batch_of
from jaxgpt.training.setup import Training
from jaxgpt.training.state import TrainState
from jaxgpt.training.step import make_eval_step

DIVERGED = 3  # the exit code of a run that diverged and could not recover
WORST = 1e30  # stands for a validation loss that is not finite: JSON has no infinity


@dataclasses.dataclass
class Clock:
    """Training time, tokens and validation losses so far, over resumes; saved with checkpoints."""

    seconds: float = 0.0
    tokens: int = 0
    validations: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    skips: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # see `batch_of`
    rollbacks: int = 0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def now(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    @property
    def best(self) -> tuple[int, float]:
        """The (step, loss) of the least validation loss, the earliest of equals."""
        return best_of(self.validations)

    def is_out_of_patience(self, patience: int) -> bool:
        """Says whether the last `patience` validations (0: never) brought no better loss."""
        return is_out_of_patience(self.validations, patience)


def restore_or_init(
    run: Training, data: Prepared, checkpoints: Checkpoints
) -> tuple[TrainState, Clock]:
    """Returns the newest checkpoint's state, else a fresh one.

    Raises:
      BadInput: if the checkpoint was trained on another token stream.
    """
    step = checkpoints.newest_whole()
    if step is None:
        return run.first_state(), Clock()
    state, meta = checkpoints.restore(step, run.abstract_state())
    if meta.get("data_fingerprint") != data.fingerprint:
        raise BadInput(
            f"the text of data.source={run.config.data.source} or its tokenizer has changed"
            f" since checkpoint {step}; restore it, or choose another --workdir"
        )
    past, skips = ([tuple(p) for p in meta.get(name, [])] for name in ("validations", "skips"))
    seconds, rollbacks = meta.get("seconds", 0.0), meta.get("rollbacks", 0)
    return state, Clock(seconds, meta["tokens"], past, skips, rollbacks)


class Loop:
    """The part of a run that repeats. Making one checks the data against the config.

    Raises:
      BadInput: if a split is shorter than a window, the sample's prompt is longer than the
        context, or another value under `sample.` is out of range.
    """

    def __init__(self, run: Training, data: Prepared):
        config = run.config
        self.run, self.config, self.data = run, config, data
        self.stream = training_stream(data.train, config)
        self.evaluate = Perplexity(
            make_eval_step(run.spec),
            run.batch_sharding,
            data.validation,
            config.model.max_seq_len,
            config.batch_size // config.grad_accum,
        )
        self.sample = TrainingSample(run.spec, data.tokenizer, config.sample)
        self.last_validation: dict | None = None
        self.spikes = Spikes()

    def __call__(
        self,
        state: TrainState,
        clock: Clock,
        train_step: Callable,
        checkpoints: Checkpoints,
        report: Reporter,
    ) -> int:
        """Trains from `state` to `num_steps` and returns the exit code."""
        self.checkpoints, self.report = checkpoints, report
        hosts.meet()  # from here on a signal is one to all; before, it ends the process at once
        with StopRequest() as stop:
            while True:
                try:
                    stopped_by = self._train(state, clock, train_step, stop)
                    break
                except Diverged as e:
                    if clock.rollbacks == self.config.max_rollbacks:
                        self._give_up(e, clock)
                        checkpoints.close()
                        return DIVERGED
                    state, clock = self._roll_back(e, clock)
            checkpoints.close()
        if stopped_by:
            step = checkpoints.latest()
            say(f"stopped   by signal {stopped_by} after step {step}, which is saved")
            return 128 + stopped_by
        return 0

    def _train(self, state: TrainState, clock: Clock, train_step, stop: StopRequest) -> int:
        """Trains to `num_steps`, a stop signal on any process or early stopping; returns the
        signal's number, 0 if there was none.

        Raises:
          Diverged: after too many bad steps in a row.
        """
        config, start = self.config, int(state.step)
        batches = device_batches(
            self.stream,
            self.run.batch_sharding,
            start,
            config.num_steps,
            partial(batch_of, skips=clock.skips),
        )
        speed = _Speed(start)
        ended = False  # by early stopping
        logged = None  # a row waits until the next step is dispatched, so the device never does
        vote = hosts.Vote(self.run.mesh)
        self.clock = clock
        clock.started = time.perf_counter()
        for step, batch in enumerate(batches, start=start + 1):
            state, metrics = train_step(state, batch)
            clock.tokens += self.stream.num_targets(batch_of(step, clock.skips))
            if logged:
                logged = self._log(*logged, clock, speed)
            end, stopping = step == config.num_steps, vote(stop.received)
            if end or _due(step, config.log_every):
                logged = (step, clock.tokens, metrics)
            validates = (end or _due(step, config.eval_every)) and not stopping
            samples = (end or _due(step, config.sample_every)) and not stopping
            saves = end or _due(step, config.checkpoint_every) or stopping
            if validates or samples or saves:
                logged = logged and self._log(*logged, clock, speed)
                if validates:
                    with outlived("validation", step):
                        self._validate(state, step, clock)
                    ended = clock.is_out_of_patience(config.early_stop)
                    is_best = config.early_stop > 0 and clock.best[0] == step
                    saves = saves or ended or is_best
                if samples:
                    with outlived("sample", step):
                        self._sample(state, step)
                if saves:
                    self._save(state, step, clock)
                speed.restart(step)
            if ended or stopping:
                return stopping
        return 0

    def _roll_back(self, e: Diverged, clock: Clock) -> tuple[TrainState, Clock]:
        """Returns the newest whole checkpoint's state, the bad batches left out of what follows."""
        state, earlier = restore_or_init(self.run, self.data, self.checkpoints)
        restored = int(state.step)
        first = max(e.step - e.in_a_row + 1, restored + 1)
        earlier.skips = [*clock.skips, (first, e.step - first + 1)]
        earlier.seconds, earlier.rollbacks = clock.now(), clock.rollbacks + 1
        self.report.rewind(restored)
        say(
            f"diverged  {e.in_a_row} non-finite steps in a row up to step {e.step}: back to"
            f" checkpoint {restored}, without {self._batches(e, clock)}"
        )
        return state, earlier

    def _give_up(self, e: Diverged, clock: Clock) -> None:
        say(
            f"diverged  {e.in_a_row} non-finite steps in a row up to step {e.step}, after"
            f" {clock.rollbacks} rollbacks: giving up. The last of them took"
            f" {self._batches(e, clock)}; look at one with python -m jaxgpt.prepare --config=FILE"
            f" --show={batch_of(e.step, clock.skips)}, or lower optim.learning_rate"
        )

    def _batches(self, e: Diverged, clock: Clock) -> str:
        steps = range(e.step - e.in_a_row + 1, e.step + 1)
        return f"batches {', '.join(str(batch_of(s, clock.skips)) for s in steps)}"

    def _log(self, step: int, tokens: int, metrics: dict, clock: Clock, speed: "_Speed") -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        step_seconds = speed.seconds_per_step(step)
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
                per_step / step_seconds,
                self.config.model,
                devices.flat[0].device_kind,
                devices.size,
            ),
            "seconds": clock.now(),
        }
        self.report.metrics(row)
        eta = (self.config.num_steps - step) * step_seconds
        if self.report.active:
            say(train_line(row, self.config.num_steps, eta))
        batch = batch_of(step, clock.skips)
        if values["in_a_row"]:
            say(
                f"skipped   step {step} (batch {batch}): loss or gradient not finite,"
                f" {values['in_a_row']:.0f} in a row, {values['skipped']:.0f} in all"
            )
        elif usual := self.spikes(values["loss"]):
            say(
                f"spike     loss {values['loss']:.4f} at step {step} (batch {batch}), usually"
                f" {usual:.4f}"
            )
        if values["in_a_row"] >= self.config.max_bad_steps:
            raise Diverged(step, int(values["in_a_row"]))

    def _validate(self, state: TrainState, step: int, clock: Clock) -> None:
        jax.block_until_ready(state.step)  # steps still under way are not the evaluation's time
        began = time.perf_counter()
        windows = self.config.eval_batches * self.config.batch_size  # whatever grad_accum is
        found = self.evaluate(state.best_params, windows)
        row = {"step": step, "split": "validation"}
        row |= {name: _finite(found[name]) for name in ("loss", "perplexity", "bits_per_byte")}
        row["seconds"] = clock.now()
        self.report.metrics(row)
        self.last_validation = row
        clock.validations.append((step, WORST if row["loss"] is None else row["loss"]))
        if self.report.active:
            line = validation_line(row, self.config.num_steps)
            say(f"{line} | took {duration(time.perf_counter() - began)}")

    def _sample(self, state: TrainState, step: int) -> None:
        if text := self.sample(state.best_params, step):
            self.report.sample({"step": step, "prompt": self.config.sample.prompt, "text": text})
            if self.report.active:
                body = (self.config.sample.prompt + text).strip("\n")
                say(f"--- sample at step {step} ---\n{body}\n---")

    def _save(self, state: TrainState, step: int, clock: Clock) -> None:
        meta = {
            "tokens": clock.tokens,
            "seconds": clock.now(),
            "validations": clock.validations,
            "skips": clock.skips,
            "rollbacks": clock.rollbacks,
            "data_fingerprint": self.data.fingerprint,
            "seed": self.config.seed,
            "config": as_stored(self.config),
            "versions": {
                name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")
            },
            "environment": environment(self.run.mesh),
            "data": self.data.summary,
        }
        loss = dict(clock.validations).get(step)
        self.report.sync()
        self.checkpoints.save(step, state, meta, loss)


@contextmanager
def outlived(what: str, step: int) -> Iterator[None]:
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


def _finite(value: float) -> float | None:
    """JSON knows no NaN and no infinity: they become null."""
    return value if math.isfinite(value) else None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Speed:
    """Seconds per step since the last restart, evaluation and saving apart."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        self.step, self.since = step, time.perf_counter()

    def seconds_per_step(self, step: int) -> float:
        now = time.perf_counter()
        seconds = (now - self.since) / max(step - self.step, 1)
        self.step, self.since = step, now
        return seconds
