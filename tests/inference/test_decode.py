"""Decoding with a cache: unequal prompts, and neighbours that change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import BadInput
from jaxgpt.inference.decode import check_length, generate, make_decode, until
from jaxgpt.inference.samplers import Sampling
from jaxgpt.model import ModelSpec
from tests.conftest import mesh_of, tiny_config


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_greedy_equals_the_plain_loop_for_unequal_prompts(shape):
    config = tiny_config(shape, position="rope", num_kv_heads=2)
    prompts = [np.array(p, np.int32) for p in ([5], [9, 8, 7, 6], list(range(15)))]
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config.model, "xla")
        # larger than GPT-2's init, so that attention decides the next token
        params = jax.tree.map(lambda p: 10 * p, jax.jit(spec.init)(jax.random.key(3)))
        found = generate(make_decode(spec, Sampling(0.0), 6), params, prompts, 24, seed=0)
        forward = jax.jit(lambda p, t: spec.for_decoding().bind(p)(t))
        for prompt, got in zip(prompts, found, strict=True):
            ids = list(prompt)
            for _ in range(6):
                ids.append(int(jnp.argmax(forward(params, jnp.asarray([ids]))[0, -1])))
            np.testing.assert_array_equal(got, ids[len(prompt) :])


def test_a_sample_depends_on_its_prompt_seed_and_number_only():
    config = tiny_config()
    one, two = np.array([5, 6], np.int32), np.array([7], np.int32)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config.model, "xla")
        params = jax.jit(spec.init)(jax.random.key(3))
        decode = make_decode(spec, Sampling(1.0, 0, repetition_penalty=1.1), 8)
        alone = generate(decode, params, [one], 24, seed=1)
        beside = generate(decode, params, [one, two], 24, seed=1)
        np.testing.assert_array_equal(alone[0], beside[0])
        other = generate(decode, params, [one], 24, seed=2)
        assert not np.array_equal(alone, other)
        assert not np.array_equal(*generate(decode, params, [one, one], 24, seed=1))
        assert np.all(beside < config.model.vocab_size)


def test_a_prompts_padding_counts_as_nothing_said():
    """Prompts are padded with id 0: a repetition penalty must not hold that against id 0."""
    config, prompt = tiny_config(), [np.array([5, 6, 7], np.int32)]
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config.model, "xla")
        params = jax.jit(spec.init)(jax.random.key(3))
        logits = jax.jit(lambda p, t: spec.for_decoding().bind(p)(t))(params, prompt[0][None])
        best = int(jnp.argmax(logits[0, -1]))
        assert logits[0, -1, best] > 0 and best != 0
        table = np.array(params["tokens"])
        table[0] = 3 * table[best]  # id 0 is now three times as strong
        decode = make_decode(spec, Sampling(0.0, repetition_penalty=4.0), 2)
        tokens = generate(decode, params | {"tokens": jnp.asarray(table)}, prompt, 24, seed=0)[0]
    assert tokens[0] == 0, "not said before: no penalty"
    assert tokens[1] != 0, "said now"


def test_lengths_and_ends():
    check_length(20, 4, 24)
    with pytest.raises(BadInput, match="ask for at most 4 new tokens"):
        check_length(20, 5, 24)
    with pytest.raises(BadInput, match="more than the model's context of 24"):
        check_length(25, 1, 24)
    np.testing.assert_array_equal(until(np.array([3, 4, 9, 5, 9]), 9), [3, 4])
    np.testing.assert_array_equal(until(np.array([3, 4]), 9), [3, 4])
