"""Text as it grows: whole characters, stop strings, ends; and what a row of JSON may ask for."""

import re

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxgpt.inference.decode import Decoder
from jaxgpt.inference.generation import Continuation, generate_text, stream_text
from jaxgpt.inference.requests import GenerationRequest, Sampling, parse_request
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import make_tokenizer
from tests.conftest import mesh_of, tiny_config

BYTES = make_tokenizer("byte")


@hypothesis.given(
    st.text(max_size=30),
    st.lists(st.integers(1, 5), min_size=1),
    st.lists(st.text("ab€😀", min_size=1, max_size=3), max_size=2),
)
def test_shown_text_is_a_growing_prefix_of_the_end_result(text, sizes, stops):
    ids = list(text.encode())
    growing = Continuation(BYTES, GenerationRequest("", max(len(ids), 1), stop=tuple(stops)))
    shown, at = "", 0
    while at < len(ids) and not growing.finish_reason:
        size = sizes[at % len(sizes)]
        piece = ids[at : at + size]
        shown += growing.feed(piece, [0.0] * len(piece))
        at += size
        assert shown == growing.text
        assert growing.finish_reason or "\ufffd" not in shown or "\ufffd" in text
    cuts: list[int] = []
    for n in range(len(text) + 1):  # the stop string that is complete first wins
        cuts = cuts or [text[:n].find(stop) for stop in stops if stop in text[:n]]
    assert shown == (text[: min(cuts)] if cuts else text)
    assert growing.finish_reason == ("stop" if cuts else "length" if ids else "")


def test_half_characters_wait_and_broken_ones_show_at_the_end():
    growing = Continuation(BYTES, GenerationRequest("", 5))
    euro = list("€".encode())
    assert growing.feed(euro[:2], [0.0] * 2) == ""
    assert growing.feed([*euro[2:], 0xE2], [0.0] * 2) == "€"
    assert growing.feed([0x41], [0.0]) == "\ufffdA" and growing.finish_reason == "length"


def test_end_of_text_ends_and_is_not_shown():
    growing = Continuation(BYTES, GenerationRequest("", 5))
    assert growing.feed([65, BYTES.end_of_text, 66], [-1.0, -2.0, -3.0]) == "A"
    assert (growing.finish_reason, growing.tokens, growing.logprobs) == ("stop", [65], [-1.0])
    assert growing.feed([67], [0.0]) == ""


def test_requests_of_all_kinds_side_by_side_are_what_each_is_alone():
    config = tiny_config(vocab_size=257, max_seq_len=96)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        decoder = Decoder.of(spec, jax.jit(spec.init)(jax.random.key(0)), spec.model.vocab_size)
        requests = [
            GenerationRequest("abc", 30, Sampling(1.0, 0), seed=1),
            GenerationRequest("defghi", 7, Sampling(0.0)),
            GenerationRequest("", 30, Sampling(1.0, 0, top_p=0.9), seed=1, sample_index=1),
        ]
        together = generate_text(decoder, BYTES, requests)
        for request, text in zip(requests, together, strict=True):
            (alone,) = generate_text(decoder, BYTES, [request])
            assert (alone.text, alone.tokens) == (text.text, text.tokens)
            np.testing.assert_allclose(alone.logprobs, text.logprobs, atol=1e-5)
            pieces = "".join(piece for _, piece, _ in stream_text(decoder, BYTES, [request], 3))
            assert pieces == text.text
        assert len(together[1].tokens) == 7
        with pytest.raises(BadInput, match="ask for at most 93 new tokens"):
            next(stream_text(decoder, BYTES, [GenerationRequest("abc", 94)]))


def test_a_row_wins_over_the_flags():
    default = GenerationRequest("", 50, Sampling(0.5, 3), seed=4, stop=("x",))
    found = parse_request(
        {"prompt": "p", "top_k": 7, "seed": 9, "stop": "END", "id": 1}, default, "here"
    )
    assert found == GenerationRequest("p", 50, Sampling(0.5, 7), seed=9, stop=("END",))
    assert parse_request({"prompt": "p"}, default, "here").stop == ("x",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "here has no field 'prompt'"),
        ({"prompt": 3}, "here: prompt=3 is not of the right type"),
        ({"prompt": "", "max_new_tokens": 0}, "here: max_new_tokens=0 must be at least 1"),
        ({"prompt": "", "max_new_tokens": True}, "max_new_tokens=True is not of the right type"),
        ({"prompt": "", "temperature": -1}, "here: temperature=-1.0 must be at"),
        ({"prompt": "", "temperature": "hot"}, "temperature='hot' is not of the right type"),
        ({"prompt": "", "top_k": 1.5}, "top_k=1.5 is not of the right type"),
        ({"prompt": "", "seed": -1}, "seed=-1 must be at least 0"),
        ({"prompt": "", "stop": [""]}, "must hold strings that are not empty"),
        ({"prompt": "", "stop": [3]}, "must hold strings that are not empty"),
    ],
)
def test_rows_that_ask_for_nonsense(row, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        parse_request(row, GenerationRequest(""), "here")
