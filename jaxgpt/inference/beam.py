"""Beam search: the likeliest continuations found by keeping the best few at every step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.inference.decode import Decoder, Rows, check_length, keys_of, only
from jaxgpt.inference.samplers import Sampling
from jaxgpt.model import ModelSpec
from jaxgpt.model.cache import empty_cache


def beam_search(
    decoder: Decoder,
    prompt: np.ndarray,
    new: int,
    beams: int,
    end: int,
    length_penalty: float = 1.0,
) -> list[tuple[np.ndarray, float]]:
    """Returns `beams` continuations of at most `new` tokens, the best first, each with its score:
    the sum of log-probabilities over the length to the power of `length_penalty` (arXiv:1609.08144,
    section 7, without its constant 5). A continuation that reaches `end` keeps its sum and its
    place among the beams; its tokens stop in front of `end`, which counts.

    Raises:
      BadInput: where prompt and continuation exceed the context.
    """
    check_length(len(prompt), new, decoder.cfg)
    same = [prompt] * beams
    rows = decoder.start(same, [Sampling(0.0)] * beams, keys_of([(0, 0)] * beams), new)
    tokens, sums, lengths = jax.device_get(
        _search(decoder.spec, new, end, decoder.drawable, decoder.params, rows)
    )
    scores = sums / lengths**length_penalty
    found = [(row[:length], float(score)) for row, length, score in zip(tokens, lengths, scores)]
    found = [(row[:-1] if len(row) and row[-1] == end else row, score) for row, score in found]
    return sorted(found, key=lambda pair: -pair[1])


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _search(spec: ModelSpec, new: int, end: int, drawable: int, params: dict, rows: Rows):
    model, beams = spec.bind(params), rows.token.shape[0]
    table = model.table()
    vocab = spec.cfg.padded_vocab_size
    only_end = jnp.where(jnp.arange(vocab) == end, 0.0, -jnp.inf)

    def step(carry, at):
        recent, token, position, sums, ended, tokens, lengths = carry
        x, recent = model.extend(params["blocks"], token, position, rows.cache, recent, at)
        logits = jax.sharding.reshard(model.next_logits(x, table), jax.P(None, None))
        scores = only(jax.nn.log_softmax(logits, axis=-1), drawable)
        totals = sums[:, None] + jnp.where(ended[:, None], only_end, scores)
        sums, best = jax.lax.top_k(totals.reshape(-1), beams)
        parent, token = best // vocab, (best % vocab).astype(jnp.int32)
        was_ended = ended[parent]
        recent = jax.tree.map(partial(_rows_of, at=parent), recent)  # the prompt is the same in all
        tokens = tokens[parent].at[:, at].set(token)
        lengths = lengths[parent] + ~was_ended
        return (
            recent,
            token,
            position + 1,
            sums,
            was_ended | (token == end),
            tokens,
            lengths,
        ), None

    first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)  # all beams are one at the start
    zeros = jnp.zeros(beams, jnp.int32)
    carry = (
        empty_cache(spec.cfg, beams, new, spec.rules),
        rows.token,
        rows.position,
        first,
        zeros > 0,
        jnp.zeros((beams, new), jnp.int32),
        zeros,
    )
    (*_, sums, _, tokens, lengths), _ = jax.lax.scan(step, carry, jnp.arange(new))
    return tokens, sums, lengths


def _rows_of(a: jax.Array, at: jax.Array) -> jax.Array:
    return a.at[at].get(out_sharding=jax.typeof(a).sharding.spec)
