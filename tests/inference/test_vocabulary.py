"""A model's vocabulary may be larger than its tokenizer's: the ids beyond are never drawn."""

import jax
import numpy as np
import pytest

from jaxgpt.config import SampleConfig
from jaxgpt.inference.beam import beam_search
from jaxgpt.inference.decode import Decoder, generate
from jaxgpt.inference.generation import generate_text
from jaxgpt.inference.requests import BeamSettings, GenerationRequest, Sampling
from jaxgpt.model import ModelSpec
from jaxgpt.tokenizer import make_tokenizer
from tests.conftest import mesh_of, tiny_config

BYTES = make_tokenizer("byte")


@pytest.fixture(scope="module")
def model():
    """An untrained model of 1024 ids, all about as likely, for a tokenizer of 257."""
    config = tiny_config(vocab_size=1024, max_seq_len=48)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        yield spec, jax.jit(spec.init)(jax.random.key(0))


def test_it_draws_what_the_tokenizer_knows(model):
    decoder = Decoder.of(*model, BYTES.vocab_size)
    prompts = [np.array([i], np.int32) for i in range(8)]
    for sampling in (Sampling(1.0, 0), Sampling(0.0), Sampling(5.0, 40, 0.9, 0.1, 1.5)):
        tokens, _ = generate(decoder, prompts, 40, sampling)
        assert tokens.max() < 257
    assert len(np.unique(generate(decoder, prompts, 40, Sampling(1.0, 0))[0])) > 100
    everything, _ = generate(Decoder.of(*model, 1024), prompts, 40, Sampling(1.0, 0))
    assert everything.max() > 800, "the model itself would draw any"


def test_the_scores_are_the_model_s_own(model):
    """As in evaluation: probabilities over all of the model's ids."""
    prompt = np.array([5], np.int32)
    decoder = Decoder.of(*model, BYTES.vocab_size)
    (tokens,), (scores,) = generate(decoder, [prompt], 6, Sampling(0.0))
    spec, params = model
    logits = jax.jit(lambda t: spec.for_decoding().bind(params)(t))(
        np.array([[*prompt, *tokens[:-1]]])
    )
    want = np.asarray(jax.nn.log_softmax(logits[0]))[np.arange(6), tokens]
    np.testing.assert_allclose(scores, want, atol=1e-5)


def test_beams(model):
    decoder = Decoder.of(*model, BYTES.vocab_size)
    prompt, end = np.array([5], np.int32), BYTES.end_of_text
    for tokens, _ in beam_search(decoder, prompt, 8, BeamSettings(4), end):
        assert len(tokens) == 0 or tokens.max() < 257


def test_the_sample_of_training(model):
    from jaxgpt.objectives.training_sample import TrainingSample

    text = TrainingSample(model[0], BYTES, SampleConfig(prompt="ab", max_new_tokens=40))(
        model[1], 7
    )
    decoder = Decoder.of(*model, BYTES.vocab_size)
    sampling = Sampling(SampleConfig().temperature, SampleConfig().top_k)
    (want,) = generate_text(decoder, BYTES, [GenerationRequest("ab", 40, sampling, 7)])
    assert text == want.text and len(text) > 5


def test_prompts_that_each_fit_go_together(model):
    """A long prompt that wants little beside a short one that wants much."""
    decoder = Decoder.of(*model, BYTES.vocab_size)
    asked = [
        GenerationRequest("x" * 44, 4, Sampling(0.0)),
        GenerationRequest("y", 47, Sampling(1.0, 0), seed=3),
    ]
    together = generate_text(decoder, BYTES, asked)
    for request, text in zip(asked, together, strict=True):
        (alone,) = generate_text(decoder, BYTES, [request])
        assert (text.text, text.tokens, text.finish_reason) == (
            alone.text,
            alone.tokens,
            alone.finish_reason,
        )


def test_values_at_the_edge_of_float32_still_draw(model):
    """What float32 rounds to 0 or to nothing must not leave a row without a likeliest id."""
    decoder = Decoder.of(*model, BYTES.vocab_size)
    prompt = [np.array([5], np.int32)]
    greedy, _ = generate(decoder, prompt, 6, Sampling(0.0))
    for sampling in (
        Sampling(1e-300, 0),
        Sampling(1e-38, 0),
        Sampling(1.0, 0, top_p=1e-300),
        Sampling(1.0, 0, top_p=1e-40),
        Sampling(1.0, 0, min_p=1.0),
        Sampling(1.0, 1),
    ):
        np.testing.assert_array_equal(generate(decoder, prompt, 6, sampling)[0], greedy)
    for sampling in (Sampling(1e6, 0), Sampling(1.0, 0, min_p=1e-45), Sampling(1.0, 2**31 - 1)):
        tokens, scores = generate(decoder, prompt, 6, sampling)
        assert tokens.max() < 257 and np.isfinite(scores).all()
