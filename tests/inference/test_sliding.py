"""Past the context by windows that are read anew: as the plain forward on the same windows."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.inference.decode import Decoder, sample_keys, stream
from jaxgpt.inference.generation import generate_text, stream_text
from jaxgpt.inference.requests import GenerationRequest, Sampling
from jaxgpt.inference.sliding import announce, slide
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from tests.conftest import mesh_of, tiny_config
from tests.inference.test_decode import model_of
from tests.tokenizer.test_tokenizers import gpt2_folder, hf_folder, made  # noqa: F401

T = 24


def plain_windows(forward, prompt, new: int, penalty: float) -> tuple[list[int], list[float]]:
    """Greedy, token by token with the whole forward and no cache, on the windows of the docs."""
    text, start, scores = list(map(int, prompt)), 0, []
    for _ in range(new):
        if len(text) - start >= T:
            start = len(text) - T // 2
        window = text[start:]
        padded = np.zeros((1, T), np.int32)
        padded[0, : len(window)] = window
        logits = np.asarray(forward(padded), np.float64)[0, len(window) - 1]
        judged = logits.copy()
        for token in set(text):
            judged[token] *= penalty if judged[token] < 0 else 1 / penalty
        text.append(int(np.argmax(judged)))
        scores.append(logits[text[-1]] - np.log(np.exp(logits).sum()))
    return text[len(prompt) :], scores


@pytest.mark.parametrize(
    ("position", "penalty", "chunk"), [("learned", 1.0, 20), ("sinusoidal", 1.5, 7)]
)
def test_greedy_equals_the_plain_forward_on_the_same_windows(position, penalty, chunk):
    """Rows that fill the context at different times; prompts just below, at and above it."""
    config = tiny_config(position=position)
    prompts = [np.arange(5, 5 + n, dtype=np.int32) for n in (1, T - 1, T, 2 * T + 3)]
    with jax.set_mesh(mesh_of(config)):
        decoder, forward = model_of(config, 4)
        sampling = [Sampling(0.0, repetition_penalty=penalty)] * len(prompts)
        keys = sample_keys([(0, 0)] * len(prompts))
        parts = list(slide(decoder, prompts, 60, sampling, keys, chunk))
        tokens, scores = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        assert tokens.shape == (4, 60)
        for row, prompt in enumerate(prompts):
            want, wanted_scores = plain_windows(forward, prompt, 60, penalty)
            np.testing.assert_array_equal(tokens[row], want)
            np.testing.assert_allclose(scores[row], wanted_scores, atol=1e-4)


def test_draws_are_those_of_the_seed_and_do_not_repeat():
    """By a model that finds all tokens alike, draws are those of the keys alone: as without sliding
    up to the first cut, then others in each window; and as alone in a crowd, in any chunks."""
    config = tiny_config()
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        params = jax.tree.map(jnp.zeros_like, jax.jit(spec.init)(jax.random.key(0)))
        decoder, drawn = Decoder.of(spec, params, 203), Sampling(1.0, 0)

        def draw(generate, prompts, new, chunk=20):
            keys = sample_keys([(7, i) for i in range(len(prompts))])
            parts = generate(decoder, prompts, new, [drawn] * len(prompts), keys, chunk=chunk)
            return np.concatenate([tokens for tokens, _ in parts], axis=1)

        prompt = np.array([5, 6, 7], np.int32)
        (found,) = draw(slide, [prompt], 70)
        np.testing.assert_array_equal(found[: T - 3], draw(stream, [prompt], T - 3)[0])
        half = T - T // 2
        for window in range(3):  # the same positions, one window further on
            one = slice(T - 3 + window * half, T - 3 + (window + 1) * half)
            two = slice(one.stop, one.stop + half)
            assert np.mean(found[one] == found[two]) < 0.2
        beside = draw(slide, [prompt, np.arange(11, dtype=np.int32)], 70, chunk=7)
        np.testing.assert_array_equal(beside[0], found)


@pytest.fixture(scope="module")
def sliding():
    """A decoder that slides and draws ids below 300, whatever the tokenizer knows."""
    config = tiny_config(vocab_size=300)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        decoder = Decoder.of(spec, jax.jit(spec.init)(jax.random.key(1)), 300)
        yield dataclasses.replace(decoder, slides=True)


@pytest.mark.parametrize("name", ["byte", "char", "sentencepiece", "gpt2"])
def test_text_is_whole_wherever_a_window_is_cut(sliding, made, name):  # noqa: F811
    """A cut falls inside characters of several bytes, whose text must not change by that."""
    tokenizer, prompt = made[name], "€" * 9 + " the licence "
    asked = GenerationRequest(prompt, 50, Sampling(1.0, 0), seed=3)
    other = dataclasses.replace(asked, prompt="a", seed=2)
    whole, second = generate_text(sliding, tokenizer, [asked, other])
    assert len(whole.tokens) == 50 or whole.finish_reason == "stop"
    ids = [*tokenizer.encode(prompt), *whole.tokens]
    assert tokenizer.decode(tokenizer.encode(prompt)) + whole.text == tokenizer.decode(ids)
    one_by_one = partial(stream_text, sliding, tokenizer, chunk=4)
    pieces = [piece for _, piece, _ in one_by_one([asked])]
    assert "".join(pieces) == whole.text and len(pieces) > 3
    alone = "".join(piece for _, piece, _ in one_by_one([other]))
    assert alone == second.text
    stop = second.text[20:23]
    *_, (_, _, ended) = one_by_one([dataclasses.replace(other, stop=(stop,))])
    assert ended.finish_reason == "stop" and ended.text == alone[: alone.find(stop)]


@pytest.mark.parametrize(
    ("model", "slides", "says"),
    [
        ({}, True, "fills the context of 24 tokens goes on from its last 12, read anew"),
        ({"position": "rope"}, True, "goes on from its last 12, read anew"),
        ({"position": "rope", "window": 6}, False, "which slides by itself"),
    ],
)
def test_what_slides_is_said(model, slides, says, capsys):
    assert announce(tiny_config(**model).model) == slides
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    with pytest.raises(BadInput, match="a context of 1 token has no half to keep"):
        announce(tiny_config(max_seq_len=1).model)
