"""Continuous batching: requests join and leave a batch of fixed size while others are generated.

One thread owns the device. Between two chunks it puts waiting requests into free slots. The shapes
of the compiled programs never change, and rows do not affect each other: a seeded request gets the
same text alone and in a crowd.
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

from jaxgpt.inference.decode import Decoder, DecodeState, Logprobs, sample_keys
from jaxgpt.inference.generation import Continuation
from jaxgpt.inference.requests import GenerationRequest
from jaxgpt.inference.score import score
from jaxgpt.tokenizer import Tokenizer

CHUNK = 4  # tokens generated between two looks at the queue


class Busy(Exception):
    """The queue is full, or the batcher is closing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """What the jobs of one HTTP request share: whether they want the likeliest alternatives to each
    generated token, and the log-probabilities of their prompts."""

    with_top: bool = False
    with_prompt_logprobs: bool = False


@dataclasses.dataclass(eq=False)
class Job:
    """One text to generate. The batcher's thread calls `on_text(text just added, continuation)`,
    the last time with the continuation's `finish_reason` set; at a shutdown that is "closed"."""

    prompt: np.ndarray
    request: GenerationRequest
    on_text: Callable[[str, Continuation], None]
    text: Continuation
    group: Group
    prompt_logprobs: Logprobs | None = None
    cancelled: bool = False


class Batcher:
    """Generates text in `slots` rows of one batch; at most `max_waiting` jobs wait for a slot.

    A free slot goes to the group that has the fewest slots, and no group takes the last one; beside
    others only one of its prompts is read between two chunks: a request for many long texts does
    not block the others.
    """

    def __init__(
        self, decoder: Decoder, mesh: Mesh, tokenizer: Tokenizer, slots: int, max_waiting: int
    ):
        self.decoder, self.mesh, self.tokenizer = decoder, mesh, tokenizer
        self.jobs: list[Job | None] = [None] * slots
        self.max_waiting, self.waiting = max_waiting, deque()
        self.changed, self.closing, self.deadline = threading.Condition(), False, 0.0
        self.failure: BaseException | None = None  # what ended the thread, if not `close`
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.thread.start()

    @property
    def active(self) -> int:
        """How many slots are taken."""
        return sum(job is not None for job in self.jobs)

    @property
    def capacity(self) -> int:
        """How many jobs may be in slots or waiting."""
        return len(self.jobs) + self.max_waiting

    def submit(
        self, choices: Sequence[tuple[np.ndarray, GenerationRequest, Callable]], group: Group
    ) -> list[Job]:
        """Queues (prompt, request, on_text), whose lengths were checked: all of them or none.
        Raises `Busy` if they do not fit into the queue, or the batcher is closing."""
        jobs = [
            Job(prompt, request, on_text, Continuation(self.tokenizer, request, prompt), group)
            for prompt, request, on_text in choices
        ]
        with self.changed:
            if self.closing or len(self.waiting) + self.active + len(jobs) > self.capacity:
                raise Busy
            self.waiting.extend(jobs)
            self.changed.notify()
        return jobs

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Ends jobs whose text nobody reads any more: waiting ones at once, running ones after the
        current chunk."""
        with self.changed:
            for job in jobs:
                job.cancelled = True
                if job in self.waiting:
                    self.waiting.remove(job)

    def close(self, grace: float = 0) -> None:
        """Takes no more jobs, ends the waiting ones, lets the running ones finish for `grace`
        seconds, ends the rest, and returns."""
        with self.changed:
            self.closing, self.deadline = True, time.monotonic() + grace
            self._end(self.waiting)
            self.changed.notify()
        self.thread.join(grace + 1)  # it takes longer only inside a compilation
        self._end(self.jobs)

    def warm_up(self) -> None:
        """Compiles the programs for short prompts, so that the first request does not wait."""
        done = threading.Event()
        prompt = np.array([self.tokenizer.end_of_text], np.int32)
        request = GenerationRequest("", 1)
        self.submit([(prompt, request, lambda _, text: text.finish_reason and done.set())], Group())
        done.wait()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as e:
            self.failure = e
        finally:  # after an error too, so that nobody waits for a thread that has ended
            with self.changed:
                self.closing = True
                self._end(self.waiting)
            self._end(self.jobs)

    def _end(self, jobs: Iterable[Job | None]) -> None:
        """Tells each unfinished job, once, that no more text will come."""
        for job in filter(None, [*jobs]):
            if not (job.cancelled or job.text.finish_reason):
                job.cancelled, job.text.finish_reason = True, "closed"
                job.on_text("", job.text)

    def _serve(self) -> None:
        with jax.set_mesh(self.mesh):
            nothing = np.zeros(1, np.int32)
            state = self._prefill([nothing] * len(self.jobs), GenerationRequest(""))
            while True:
                with self.changed:
                    while not (self.waiting or self.active or self.closing):
                        self.changed.wait()
                    if self.closing and (not self.active or time.monotonic() >= self.deadline):
                        break
                state = self._admit(state)
                if self.active:
                    state = self._decode(state)

    def _prefill(self, prompts: list[np.ndarray], request: GenerationRequest) -> DecodeState:
        count, slots = len(prompts), self.decoder.spec.model.max_seq_len
        keys = sample_keys([(request.seed, request.sample_index)] * count)
        return self.decoder.prefill(prompts, [request.sampling] * count, keys, 1, slots)

    def _admit(self, state: DecodeState) -> DecodeState:
        """Puts waiting jobs into free slots. Beside other requests' texts it starts only one job,
        and beside other requests' prompts only one of each request, so that nobody waits for many
        prompts of somebody else."""
        was_active = self.active
        while None in self.jobs and (job := self._next()):
            slot = self.jobs.index(None)
            self.jobs[slot] = job  # first, so that it is told if the rest fails
            if job.group.with_prompt_logprobs:
                (job.prompt_logprobs,) = score(self.decoder, [job.prompt])
            if job.request.max_new_tokens:
                state = _insert(state, self._prefill([job.prompt], job.request), slot)
            else:
                job.text.finish_reason, self.jobs[slot] = "length", None
                job.on_text("", job.text)
            slots = Counter(job.group for job in self.jobs if job)
            if len(slots) > 1 and (was_active or slots[job.group] > 1):
                break
        return state

    def _next(self) -> Job | None:
        """Removes the next job from the queue: the oldest of the group with the fewest slots."""
        slots = Counter(job.group for job in self.jobs if job)
        with self.changed:
            job = min(self.waiting, key=lambda job: slots[job.group], default=None)
            if job is None or slots[job.group] >= max(len(self.jobs) - 1, 1):
                return None
            self.waiting.remove(job)
        return job

    def _decode(self, state: DecodeState) -> DecodeState:
        """Generates one chunk of every running text."""
        with_top = any(job.group.with_top for job in self.jobs if job)
        state, tokens, logprobs = self.decoder.decode(state, CHUNK, with_top=with_top)
        tokens, logprobs = jax.device_get((tokens, logprobs))
        for slot, job in enumerate(self.jobs):
            if job is None:
                continue
            if not job.cancelled:
                row = Logprobs(*(array[slot] for array in logprobs))
                tops = row.top_pairs() if job.group.with_top else ()
                new = job.text.feed(tokens[slot].tolist(), row.chosen.tolist(), tops)
                if new or job.text.finish_reason:
                    job.on_text(new, job.text)
            if job.cancelled or job.text.finish_reason:
                self.jobs[slot] = None
        return state


@partial(jax.jit, donate_argnums=0)
def _insert(state: DecodeState, row: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """Returns `state` with the only row of `row` in `slot`."""

    def insert(many, one):
        if jnp.issubdtype(many.dtype, jax.dtypes.prng_key):
            return many.at[slot].set(one[0])
        return jax.lax.dynamic_update_index_in_dim(many, one[0], slot, axis=0)

    return jax.tree.map(insert, state, row)
