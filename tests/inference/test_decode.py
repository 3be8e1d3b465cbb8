"""Decoding with a cache: unequal prompts, and neighbours that change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.inference.beam import SearchLimits, beam_search, hypotheses, search
from jaxgpt.inference.decode import (
    Decoder,
    check_length,
    generate,
    sample_keys,
    smallest_span,
    stream,
    tokens_before,
)
from jaxgpt.inference.requests import BeamSettings, Sampling
from jaxgpt.model import ModelSpec
from jaxgpt.ops.cache import Cache
from jaxgpt.system.errors import BadInput
from tests.conftest import mesh_of, tiny_config
from tests.model.test_gpt import DECODED_AS, VARIANTS

GREEDY = Sampling(0.0)


def model_of(config, scale=10):
    """Larger than GPT-2's init, so that attention decides the next token."""
    spec = ModelSpec(config, "xla")
    params = jax.tree.map(lambda p: scale * p, jax.jit(spec.init)(jax.random.key(3)))
    return Decoder.of(spec, params, spec.model.vocab_size), jax.jit(
        lambda t: spec.for_decoding().bind(params)(t)
    )


def plain_greedy(forward, prompt, new):
    """Token by token over the whole text, no cache: the tokens and their log-probabilities."""
    ids, scores = list(prompt), []
    for _ in range(new):
        padded = np.zeros((1, -(-(len(prompt) + new) // 8) * 8), np.int32)  # one shape to compile
        padded[0, : len(ids)] = ids
        logits = np.asarray(forward(padded))[0, len(ids) - 1]
        ids.append(int(np.argmax(logits)))
        scores.append(float(jax.nn.log_softmax(logits)[ids[-1]]))
    return ids[len(prompt) :], scores


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_the_plain_loop_in_every_variant(variant):
    config = tiny_config(**VARIANTS[variant] | DECODED_AS.get(variant, {}))
    prompts = [np.array(p, np.int32) for p in ([5], list(range(15)))]
    with jax.set_mesh(mesh_of(config)):
        decoder, forward = model_of(config, 4)
        found, scores = generate(decoder, prompts, 6, GREEDY)
        for i, prompt in enumerate(prompts):
            want, wanted_scores = plain_greedy(forward, prompt, 6)
            np.testing.assert_array_equal(found[i], want)
            np.testing.assert_allclose(scores[i], wanted_scores, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2, 1, 2)])
def test_greedy_equals_the_plain_loop_for_unequal_prompts(shape):
    config = tiny_config(shape, position="rope", num_kv_heads=2)
    prompts = [np.array(p, np.int32) for p in ([5], [9, 8, 7, 6], list(range(15)))]
    with jax.set_mesh(mesh_of(config)):
        decoder, forward = model_of(config)
        found, scores = generate(decoder, prompts, 6, GREEDY)
        for prompt, got, told in zip(prompts, found, scores, strict=True):
            want, wanted_scores = plain_greedy(forward, prompt, 6)
            np.testing.assert_array_equal(got, want)
            np.testing.assert_allclose(told, wanted_scores, atol=1e-3)


def test_a_prefix_model_reads_its_prompt_in_both_directions():
    config = dataclasses.replace(tiny_config(), objective="prefix_lm")
    prompts = [np.array(p, np.int32) for p in ([5, 7], list(range(15)))]
    spec = ModelSpec(config, "xla")
    with jax.set_mesh(mesh_of(config)):
        decoder, _ = model_of(config)
        found, _ = generate(decoder, prompts, 6, GREEDY)
        params = jax.tree.map(lambda p: 10 * p, jax.jit(spec.init)(jax.random.key(3)))
        logits = jax.jit(lambda t, n: spec.for_decoding().bind(params)(t, prefix=n))
        for prompt, got in zip(prompts, found, strict=True):
            prefix = np.array([len(prompt)], np.int32)
            want, _ = plain_greedy(lambda t: logits(t, prefix), prompt, 6)  # noqa: B023
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("context", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_windowed_model_slides_past_its_context(context):
    """Far past the ring's end: the cache has 64 slots, split over devices or not, and the text
    grows to 5 + 100 tokens."""
    config = tiny_config((1, 1, 1, 1, context), position="rope", window=6)
    with jax.set_mesh(mesh_of(config)):
        decoder, forward = model_of(config)
        prompt = np.array([5, 9, 8, 7, 6], np.int32)
        rows = decoder.prefill([prompt], [GREEDY], sample_keys([(0, 0)]), 100)
        assert rows.cache.positions.shape == (1, 64)
        held = rows.cache.layers[0].k.addressable_shards[0].data.shape
        assert held == (1, 4, 64 // context, 8)
        (found,), _ = generate(decoder, [prompt], 100, GREEDY)
        np.testing.assert_array_equal(found, plain_greedy(forward, prompt, 100)[0])
        long = np.arange(90, dtype=np.int32)  # a prompt longer than max_seq_len
        (found,), _ = generate(decoder, [long], 8, GREEDY)
        np.testing.assert_array_equal(found, plain_greedy(forward, long, 8)[0])


def test_a_sample_depends_on_its_prompt_seed_and_number_only():
    config = tiny_config()
    one, two = np.array([5, 6], np.int32), np.array([7], np.int32)
    drawn = Sampling(1.0, 0, repetition_penalty=1.1)
    with jax.set_mesh(mesh_of(config)):
        decoder, _ = model_of(config, 1)
        alone, _ = generate(decoder, [one], 8, drawn, seed=1)
        beside, _ = generate(decoder, [one, two], 8, drawn, seed=1)
        np.testing.assert_array_equal(alone[0], beside[0])
        other, _ = generate(decoder, [one], 8, drawn, seed=2)
        assert not np.array_equal(alone, other)
        assert not np.array_equal(*generate(decoder, [one, one], 8, drawn, seed=1)[0])
        assert np.all(beside < config.model.vocab_size)
        parts = stream(decoder, [one], 8, [drawn], sample_keys([(1, 0)]), chunk=3)
        pieces = [tokens for tokens, _ in parts]
        assert [piece.shape[1] for piece in pieces] == [3, 3, 2]
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1), alone)


def test_it_ends_early_when_every_row_has_ended():
    config = tiny_config(max_seq_len=128)
    with jax.set_mesh(mesh_of(config)):
        decoder, _ = model_of(config)
        tokens, _ = generate(decoder, [np.array([5], np.int32)], 100, GREEDY)
        end = int(tokens[0, 30])
        again, _ = generate(decoder, [np.array([5], np.int32)], 100, GREEDY, end=end)
        assert end in again[0] and again.shape[1] < 100


def test_a_prompts_padding_counts_as_nothing_said():
    """Prompts are padded with id 0: a repetition penalty must not hold that against id 0."""
    config, prompt = tiny_config(), np.array([5, 6, 7], np.int32)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        params = jax.jit(spec.init)(jax.random.key(3))
        logits = jax.jit(lambda p, t: spec.for_decoding().bind(p)(t))(params, prompt[None])
        best = int(jnp.argmax(logits[0, -1]))
        assert logits[0, -1, best] > 0 and best != 0
        table = np.array(params["tokens"])
        table[0] = 3 * table[best]  # id 0 is now three times as strong
        decoder = Decoder.of(spec, params | {"tokens": jnp.asarray(table)}, spec.model.vocab_size)
        (tokens,), _ = generate(decoder, [prompt], 2, Sampling(0.0, repetition_penalty=4.0))
    assert tokens[0] == 0, "not said before: no penalty"
    assert tokens[1] != 0, "said now"


def test_lengths_and_ends():
    cfg = tiny_config().model
    check_length(20, 4, cfg)
    with pytest.raises(BadInput, match="ask for at most 4 new tokens"):
        check_length(20, 5, cfg)
    with pytest.raises(BadInput, match="more than the model's context of 24"):
        check_length(25, 1, cfg)
    half = dataclasses.replace(cfg, position="rope", window=6, full_attention_every=2)
    with pytest.raises(BadInput, match="ask for at most 4 new tokens"):
        check_length(20, 5, half)  # a layer without a window cannot forget
    np.testing.assert_array_equal(tokens_before(np.array([3, 4, 9, 5, 9]), 9), [3, 4])
    np.testing.assert_array_equal(tokens_before(np.array([3, 4]), 9), [3, 4])


def all_continuations(forward, prompt, new, vocab, end):
    """Every continuation's log-probability by brute force: {tokens: log-probability}."""
    open_, done = {(): 0.0}, {}
    for _ in range(new):
        grown = {}
        for tokens, total in open_.items():
            logits = forward(jnp.asarray([[*prompt, *tokens]]))[0, -1]
            for token, score in enumerate(
                np.asarray(jax.nn.log_softmax(logits), np.float64)[:vocab]
            ):
                (done if token == end else grown)[(*tokens, token)] = total + score
        open_ = grown
    return done | open_


def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all():
    config, end, vocab = tiny_config(vocab_size=5, num_layers=1), 3, 5
    prompt = np.array([1, 2], np.int32)
    with jax.set_mesh(mesh_of(config)):
        decoder, forward = model_of(config, 6)
        every = all_continuations(forward, prompt, 3, vocab, end)
        for penalty in (0.0, 1.0, 3.0):  # all leaves, ended ones included
            found = beam_search(decoder, prompt, 3, BeamSettings(85, penalty), end)
            assert len(every) == len(found) == 85
            scores = {tokens: total / len(tokens) ** penalty for tokens, total in every.items()}
            ranked = sorted(scores.items(), key=lambda pair: -pair[1])
            np.testing.assert_allclose([s for _, s in found], [s for _, s in ranked], atol=1e-4)
            assert found[0][0].tolist() == [t for t in ranked[0][0] if t != end]
        greedy = generate(decoder, [prompt], 3, GREEDY)[0][0]
        for end in range(vocab):
            narrow = beam_search(decoder, prompt, 3, BeamSettings(1, 3.0), end)
            expected = tokens_before(greedy, end).tolist()
            assert narrow[0][0].tolist() == expected, "one beam is greedy"


def test_a_search_stops_where_no_beam_would_be_better_if_it_ended_now():
    """Worked out by hand, for 2 beams and 8 tokens. After "c" the text goes on with c for ever at
    almost no cost: such a text would be ranked first at last. The search beside it is longer."""
    end, a, b, c = range(4)
    p = np.full((4, 4), 1e-9)
    p[b] = 0.45, 0.47, 0.06, 0.02  # every text begins behind a b
    p[a] = 0.92, 0.02, 0.01, 0.05
    p[c, c] = 0.99
    tables = np.log([p, np.where(np.arange(4) == end, 1e-20, p)]).astype(np.float32)

    def extend(token, recent, at):
        return jnp.asarray(tables)[jnp.arange(4) // 2, token], recent

    def found(penalty, early=False, counted=0):
        limits = SearchLimits.of(BeamSettings(2, penalty, early), 8, end, counted)
        recent = Cache((), jnp.zeros((4, 8), jnp.int32))
        first, second = hypotheses(search(extend, jnp.full(4, b), recent, 2, limits, 4), end)
        assert [len(tokens) for tokens, _ in second] == [8, 8]
        return [tokens.tolist() for tokens, _ in first], [score for _, score in first]

    with jax.set_mesh(mesh_of(tiny_config())):
        texts, scores = found(2.0)  # the likeliest beam is "ba": log(0.0282) / 4 < log(0.45)
        assert texts == [[a], []]
        np.testing.assert_allclose(scores, [np.log(0.4324) / 4, np.log(0.45)], rtol=1e-5)
        texts, scores = found(2.0, counted=3)
        assert texts == [[a], []]
        np.testing.assert_allclose(scores, [np.log(0.4324) / 25, np.log(0.45) / 16], rtol=1e-5)
        assert found(4.0)[0][0] == [a, *[c] * 7], "log(0.0282) / 16 > log(0.45): it goes on"
        assert found(4.0, early=True)[0] == [[a], []]


def test_a_key_makes_no_program_of_its_own(monkeypatch):
    """A server makes one for each request, and compiling takes longer than the prompt."""
    monkeypatch.setattr(jax, "jit", None)
    first, second = sample_keys([(3, 4)]), sample_keys([(3, 5)])
    assert (jax.random.key_data(first) != jax.random.key_data(second)).any()


@pytest.mark.parametrize(("rows", "span"), [(1, 256), (8, 128)])
def test_spans_are_no_shorter_than_the_weights_bytes_make_worth_a_program(rows, span):
    """GPT-2 124M: a slot takes 2 * 12 * 768 floats, a sixteenth of the weights is 420 slots."""
    keys = np.broadcast_to(np.float32(0), (rows, 12, 1024, 64))
    cache = Cache(((keys, keys),) * 12, np.broadcast_to(np.int32(0), (rows, 1024)))
    weights = {"all": np.broadcast_to(np.float32(0), 124_000_000)}
    assert smallest_span(weights, cache) == span


def test_reading_less_of_the_cache_changes_nothing():
    config, prompt = tiny_config(max_seq_len=256), np.arange(15, dtype=np.int32)
    with jax.set_mesh(mesh_of(config)):
        decoder, _ = model_of(config)
        states = [decoder.prefill([prompt], [GREEDY], sample_keys([(0, 0)]), 200) for _ in range(2)]
        assert smallest_span(decoder.params, states[0].cache) < states[0].cache.positions.shape[1]
        few, all_ = (decoder.decode(s, 5, reach) for s, reach in zip(states, (20, 0), strict=True))
    np.testing.assert_array_equal(few[1], all_[1])
    np.testing.assert_allclose(few[2].chosen, all_[2].chosen, atol=1e-5)
