"""Continuous batching: texts of all ages grow side by side in a fixed number of slots.

One thread owns the device. Between two chunks it puts waiting prompts into free slots. The programs
never change shape, whatever the neighbours ask for, and rows do not mix: so a seeded answer is the
same alone and in a crowd.
"""

import dataclasses
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxgpt.inference.complete import Continuation, Request
from jaxgpt.inference.decode import Decoder, Rows, keys_of
from jaxgpt.inference.samplers import Sampling
from jaxgpt.inference.score import Scores, score_prompt
from jaxgpt.tokenizer import Tokenizer

CHUNK = 4  # tokens between two looks


class Busy(Exception):
    """The queue is full, or the batcher is closing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """What the jobs of one HTTP request share: whether they want the likeliest ids in the place of
    each token (`best`), and the scores of their prompts (`prompt_scores`)."""

    best: bool = False
    prompt_scores: bool = False


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way: `heard(text just added, its state)` is called from the batcher's
    thread, the last time with `state.finish` set ("stop", "length", "broken", or "closed" at a
    shutdown)."""

    prompt: np.ndarray
    request: Request
    heard: Callable[[str, Continuation], None]
    text: Continuation
    group: Group
    prompt_scores: Scores | None = None
    cancelled: bool = False


class Batcher:
    """Serves a decoder from `slots` slots; at most `max_waiting` jobs wait for one.

    No group gets the last slot beside its own others, and the group with the fewest slots is next:
    one that asks for many long texts does not keep another out.
    """

    def __init__(
        self, decoder: Decoder, mesh: Mesh, tokenizer: Tokenizer, slots: int, max_waiting: int
    ):
        self.decoder, self.mesh, self.tokenizer = decoder, mesh, tokenizer
        self.jobs: list[Job | None] = [None] * slots
        self.max_waiting, self.waiting = max_waiting, deque()
        self.room = decoder.cfg.max_seq_len
        self.changed, self.closing, self.deadline = threading.Condition(), False, 0.0
        self.failure: BaseException | None = None  # what ended the thread, if not `close`
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.thread.start()

    @property
    def active(self) -> int:
        """How many texts grow now."""
        return sum(job is not None for job in self.jobs)

    @property
    def capacity(self) -> int:
        """How many jobs may be under way, growing or waiting."""
        return len(self.jobs) + self.max_waiting

    def submit(
        self, asked: Sequence[tuple[np.ndarray, Request, Callable]], group: Group
    ) -> list[Job]:
        """Queues (prompt, request, heard) whose lengths were checked: all of them, or none.

        Raises:
          Busy: if too many wait already, or the batcher is closing.
        """
        jobs = [
            Job(prompt, request, heard, Continuation(self.tokenizer, request, prompt), group)
            for prompt, request, heard in asked
        ]
        with self.changed:
            if self.closing or len(self.waiting) + self.active + len(jobs) > self.capacity:
                raise Busy
            self.waiting.extend(jobs)
            self.changed.notify()
        return jobs

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Ends jobs that nobody listens to any more: they leave the queue at once, and their slots
        after the chunk."""
        with self.changed:
            for job in jobs:
                job.cancelled = True
                if job in self.waiting:
                    self.waiting.remove(job)

    def close(self, grace: float = 0) -> None:
        """Takes no more, ends what waits with finish "closed", and lets what grows finish for
        `grace` seconds before it ends the same way; returns then."""
        with self.changed:
            self.closing, self.deadline = True, time.monotonic() + grace
            self._end(self.waiting)
            self.changed.notify()
        self.thread.join(grace + 1)  # longer only inside a compilation, which nothing can stop
        self._end(self.jobs)

    def warm_up(self) -> None:
        """Compiles the programs of the shortest prompts, so that the first request does not
        wait."""
        done = threading.Event()
        prompt = np.array([self.tokenizer.end_of_text], np.int32)
        self.submit([(prompt, Request("", 1), lambda _, text: text.finish and done.set())], Group())
        done.wait()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as e:
            self.failure = e
        finally:  # after an error, too: nobody may wait for a thread that has gone
            with self.changed:
                self.closing = True
                self._end(self.waiting)
            self._end(self.jobs)

    def _end(self, jobs: Iterable[Job | None]) -> None:
        """Tells jobs that nothing more comes, once each."""
        for job in filter(None, [*jobs]):
            if not (job.cancelled or job.text.finish):
                job.cancelled, job.text.finish = True, "closed"
                job.heard("", job.text)

    def _serve(self) -> None:
        with jax.set_mesh(self.mesh):
            rows = self._start(np.zeros(1, np.int32), [Sampling()] * len(self.jobs), (0, 0))
            while True:
                with self.changed:
                    while not (self.waiting or self.active or self.closing):
                        self.changed.wait()
                    if self.closing and (not self.active or time.monotonic() >= self.deadline):
                        break
                rows = self._admit(rows)
                if self.active:
                    rows = self._grow(rows)

    def _start(self, prompt: np.ndarray, sampling: list[Sampling], seed: tuple[int, int]) -> Rows:
        count = len(sampling)
        return self.decoder.start([prompt] * count, sampling, keys_of([seed] * count), 1, self.room)

    def _admit(self, rows: Rows) -> Rows:
        """Starts waiting jobs in free slots: one between two chunks where texts are being decoded,
        which so do not wait for the prompts of many."""
        many = not self.active
        while None in self.jobs and (job := self._next()):
            request, slot = job.request, self.jobs.index(None)
            self.jobs[slot] = job  # first, so that it is told if the rest fails
            if job.group.prompt_scores:
                job.prompt_scores = score_prompt(self.decoder, job.prompt)
            if request.max_new_tokens:
                row = self._start(job.prompt, [request.sampling], (request.seed, request.number))
                rows = _insert(rows, row, slot)
            else:
                job.text.finish, self.jobs[slot] = "length", None
                job.heard("", job.text)
            if not many:
                break
        return rows

    def _next(self) -> Job | None:
        """Takes the next job out of the queue: of the group with the fewest slots, the oldest."""
        held = Counter(job.group for job in self.jobs if job)
        with self.changed:
            job = min(self.waiting, key=lambda job: held[job.group], default=None)
            if job is None or held[job.group] >= max(len(self.jobs) - 1, 1):
                return None
            self.waiting.remove(job)
        return job

    def _grow(self, rows: Rows) -> Rows:
        told = any(job.group.best for job in self.jobs if job)
        rows, grown = self.decoder.more(rows, CHUNK, best=told)
        tokens, scores, ids, best = jax.device_get(grown)
        for slot, job in enumerate(self.jobs):
            if job is None:
                continue
            if not job.cancelled:
                others = [*zip(ids[slot].tolist(), best[slot].tolist(), strict=True)]
                piece = job.text.feed(tokens[slot].tolist(), scores[slot].tolist(), others)
                if piece or job.text.finish:
                    job.heard(piece, job.text)
            if job.cancelled or job.text.finish:
                self.jobs[slot] = None
        return rows


@partial(jax.jit, donate_argnums=0)
def _insert(rows: Rows, row: Rows, slot: Int[Array, ""]) -> Rows:
    """Returns `rows` with `row`'s only row in `slot`."""

    def put(many, one):
        if jnp.issubdtype(many.dtype, jax.dtypes.prng_key):
            return many.at[slot].set(one[0])
        return jax.lax.dynamic_update_index_in_dim(many, one[0], slot, axis=0)

    return jax.tree.map(put, rows, row)
