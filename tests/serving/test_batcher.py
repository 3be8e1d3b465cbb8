"""The queue in front of the slots: who waits, who leaves, who is next."""

import threading
from contextlib import suppress

import jax
import numpy as np
import pytest

from jaxgpt.inference.decode import Decoder, DecodeState
from jaxgpt.inference.requests import GenerationRequest, Sampling
from jaxgpt.model import ModelSpec
from jaxgpt.serving import batcher as batcher_module
from jaxgpt.serving.batcher import Batcher, Busy, Group
from jaxgpt.tokenizer import make_tokenizer
from tests.conftest import PATIENCE, mesh_of, tiny_config

BYTES = make_tokenizer("byte")
LONG, SHORT = (
    GenerationRequest("", 10**6, Sampling(1.0, 0)),
    GenerationRequest("", 2, Sampling(1.0, 0)),
)


def ask(*requests: GenerationRequest, on_text=lambda piece, text: None):
    return [(np.array([BYTES.end_of_text], np.int32), request, on_text) for request in requests]


@pytest.fixture
def stopped(monkeypatch):
    """A batcher of two slots and four places whose thread does nothing: what is queued stays."""
    monkeypatch.setattr(Batcher, "_run", lambda self: None)
    config = tiny_config(vocab_size=257, max_seq_len=16)
    return Batcher(Decoder(ModelSpec(config, "xla"), {}, 257), mesh_of(config), BYTES, 2, 4)


def test_cancelled_jobs_leave_the_queue(stopped):
    jobs = stopped.submit(ask(*[LONG] * 6), Group())
    with pytest.raises(Busy):
        stopped.submit(ask(SHORT), Group())
    stopped.cancel(jobs[:4])
    assert len(stopped.waiting) == 2
    stopped.submit(ask(*[SHORT] * 4), Group())
    assert len(stopped.waiting) == 6


def test_a_group_is_queued_whole_or_not_at_all(stopped):
    stopped.submit(ask(LONG), Group())
    with pytest.raises(Busy):
        stopped.submit(ask(*[LONG] * 6), Group())
    assert len(stopped.waiting) == 1
    stopped.submit(ask(*[LONG] * 5), Group())


def test_the_group_with_the_fewest_slots_is_next_and_none_has_all(stopped):
    greedy, other = Group(), Group()
    many, (one,) = stopped.submit(ask(*[LONG] * 4), greedy), stopped.submit(ask(SHORT), other)
    assert stopped._next() is many[0]
    stopped.jobs[0] = many[0]
    assert stopped._next() is one, "though others came before"
    assert stopped._next() is None, "the last slot is not for a group that has all others"
    stopped.jobs[0] = None
    assert stopped._next() is many[1]


def test_beside_others_one_prompt_of_a_group_is_read_between_two_chunks(stopped, monkeypatch):
    """A request for many texts makes the others wait for one prompt, not for all of its own."""
    read = []

    def prefill(prompts, request):
        read.append(request.seed)
        if len(read) == 2:  # another request comes while the prompts of the first are read
            stopped.submit(ask(GenerationRequest("", 2, seed=9)), other)

    monkeypatch.setattr(stopped, "_prefill", prefill)
    monkeypatch.setattr(batcher_module, "_insert", lambda state, row, slot: state)
    stopped.jobs, stopped.max_waiting, other = [None] * 8, 99, Group()
    state = DecodeState(*[None] * len(DecodeState._fields))
    many = stopped.submit(ask(*[GenerationRequest("", 9, seed=1)] * 16), Group())
    stopped._admit(state)
    assert read == [1, 1, 9, 1]
    stopped._admit(state)
    assert read == [1, 1, 9, 1, 1]
    stopped.jobs = [job if job in many else None for job in stopped.jobs]
    stopped._admit(state)
    assert read == [1, 1, 9] + [1] * 5, "alone it has all slots but the last"


def test_a_fault_ends_all_jobs_and_is_kept():
    """Whoever waits is told, and the server can see that the thread has gone."""
    config = tiny_config(vocab_size=257, max_seq_len=16)
    decoder = Decoder(ModelSpec(config, "xla"), {}, 257)  # without parameters: it must fail
    ended, done = [], threading.Event()

    def on_text(piece, text):
        ended.append(text.finish_reason)
        done.set()

    batcher = Batcher(decoder, mesh_of(config), BYTES, 1, 4)
    with suppress(Busy):  # it may have gone before
        batcher.submit(ask(SHORT, on_text=on_text), Group())
        assert done.wait(60) and ended == ["closed"]
    batcher.thread.join(60)
    assert batcher.failure is not None
    with pytest.raises(Busy):
        batcher.submit(ask(SHORT), Group())


def test_numbers_that_are_none_end_a_text():
    from jaxgpt.inference.generation import Continuation

    text = Continuation(BYTES, LONG)
    assert text.feed([65, 66, 67], [-1.0, float("nan"), -1.0]) == "A"
    assert (text.finish_reason, text.tokens) == ("broken", [65])


def test_one_slot_serves_one_group_after_the_other():
    config = tiny_config(vocab_size=257, max_seq_len=16)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        decoder = Decoder.of(spec, jax.jit(spec.init)(jax.random.key(0)), 257)
    batcher = Batcher(decoder, mesh_of(config), BYTES, 1, 16)
    finished, done = [], threading.Semaphore(0)

    def on_text(piece, text):
        if text.finish_reason:
            finished.append(text.finish_reason)
            done.release()

    for group in (Group(with_top=True), Group(with_prompt_logprobs=True)):
        batcher.submit(ask(SHORT, SHORT, GenerationRequest("", 0), on_text=on_text), group)
    for _ in range(6):
        assert done.acquire(timeout=PATIENCE)
    assert set(finished) <= {"length", "stop"}
    batcher.close()
    assert batcher.failure is None and batcher.active == 0
