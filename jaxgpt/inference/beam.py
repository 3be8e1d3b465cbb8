"""Beam search: the likeliest continuations found by keeping the best few at every step."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.inference.decode import Decoder, DecodeState, check_length, limit_vocab, sample_keys
from jaxgpt.inference.requests import Sampling
from jaxgpt.model import ModelSpec, decoding
from jaxgpt.model.cache import Cache, empty_cache


def beam_search(
    decoder: Decoder, prompt: np.ndarray, new: int, num_beams: int, end: int
) -> list[tuple[np.ndarray, float]]:
    """Returns `num_beams` continuations of at most `new` tokens, the best first, each with its
    score: the mean log-probability of its tokens. A continuation that reaches `end` keeps its place
    among the beams; its tokens stop in front of `end`, which counts for the score.
    """
    check_length(len(prompt), new, decoder.spec.model)
    keys = sample_keys([(0, 0)] * num_beams)
    state = decoder.prefill([prompt] * num_beams, [Sampling(0.0)] * num_beams, keys, new)
    beams = jax.device_get(
        _search(decoder.spec, new, end, decoder.vocab_limit, decoder.params, state)
    )
    scores, results = beams.total / beams.length, []
    for i in np.argsort(-scores, kind="stable"):
        tokens = beams.tokens[i, : beams.length[i]]
        results.append((tokens[:-1] if tokens[-1] == end else tokens, float(scores[i])))
    return results


class Beams(NamedTuple):
    """The K beams of a search for N tokens, in the middle of it."""

    token: Int[Array, "K"]
    position: Int[Array, "K"]
    total: Float[Array, "K"]  # sum of the log-probabilities
    ended: Bool[Array, "K"]
    tokens: Int[Array, "K N"]
    length: Int[Array, "K"]
    recent: Cache | None  # the continuations' keys and values; the prompt's are the same in all


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _search(
    spec: ModelSpec, new: int, end: int, vocab_limit: int, params: dict, state: DecodeState
) -> Beams:
    model, num_beams = spec.bind(params), state.token.shape[0]
    table, vocab = model.table(), spec.model.padded_vocab_size
    only_end = jnp.where(jnp.arange(vocab) == end, 0.0, -jnp.inf)

    def step(beams: Beams, at):
        x, recent = decoding.extend(
            model, params["blocks"], beams.token, beams.position, state.cache, beams.recent, at
        )
        logits = jax.sharding.reshard(decoding.next_logits(model, x, table), jax.P(None, None))
        logprobs = limit_vocab(jax.nn.log_softmax(logits, axis=-1), vocab_limit)
        totals = beams.total[:, None] + jnp.where(beams.ended[:, None], only_end, logprobs)
        total, best = jax.lax.top_k(totals.reshape(-1), num_beams)
        parent, token = best // vocab, (best % vocab).astype(jnp.int32)

        def gather_parents(a):
            return a.at[parent].get(out_sharding=jax.typeof(a).sharding.spec)

        recent, ended, tokens, length = jax.tree.map(
            gather_parents, (recent, beams.ended, beams.tokens, beams.length)
        )
        tokens, length = tokens.at[:, at].set(token), length + ~ended
        ended = ended | (token == end)
        return Beams(token, beams.position + 1, total, ended, tokens, length, recent), None

    zeros = jnp.zeros(num_beams, jnp.int32)
    total = jnp.where(jnp.arange(num_beams) == 0, 0.0, -jnp.inf)  # at first all beams are the same
    tokens = jnp.zeros((num_beams, new), jnp.int32)
    recent = empty_cache(spec.config, num_beams, new, spec.rules)
    beams = Beams(state.token, state.position, total, zeros > 0, tokens, zeros, recent)
    beams, _ = jax.lax.scan(step, beams, jnp.arange(new))
    return beams._replace(recent=None)
