"""Beam search: the likeliest continuations found by keeping the best few at every step.

A search has K beams. At every step each beam offers its next tokens; of the 2K likeliest texts
those that end (with the end token, or as they have all N tokens) leave the beams for the K best
finished hypotheses, if they are among the first K, and the K likeliest others go on. A hypothesis
is ranked by its score: the sum of the log-probabilities of its tokens, the end token included,
divided by (number of tokens) ** length_penalty. So 0 ranks by probability, 1 by the mean, and the
larger it is, the longer the texts.

A search stops when K hypotheses are finished and none of the beams, were it to end now, would score
better than the worst of them (`early_stopping=False` of transformers, which finds the same; with a
length penalty above 0 a beam could still have become better later). With `early_stopping` it stops
as soon as K are finished. A search of one beam is greedy decoding.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.inference.decode import (
    CHUNK,
    Decoder,
    DecodeState,
    bucket_size,
    check_length,
    limit_vocab,
    sample_keys,
)
from jaxgpt.inference.requests import BeamSettings, Sampling
from jaxgpt.model import ModelSpec, decoding
from jaxgpt.ops.cache import Cache, empty_cache

Hypothesis = tuple[np.ndarray, float]  # tokens, without the end token, and score
# (a token of each row [R], the caches of the tokens so far, the column of this one) -> its next
# tokens' logits [R, V], the caches with it
Extend = Callable[[Array, Cache, Array], tuple[Array, Cache]]


def beam_search(
    decoder: Decoder, prompt: np.ndarray, new: int, settings: BeamSettings, end: int
) -> list[Hypothesis]:
    """Returns the best continuations of at most `new` tokens, one for each beam, the best first;
    their tokens stop in front of `end`."""
    check_length(len(prompt), new, decoder.spec.model)
    copies = settings.num_beams
    keys = sample_keys([(0, 0)] * copies)
    state = decoder.prefill([prompt] * copies, [Sampling(0.0)] * copies, keys, new)
    return search_texts(decoder, state, new, settings, end)[0]


def search_texts(
    decoder: Decoder,
    state: DecodeState,
    new: int,
    settings: BeamSettings,
    end: int,
    counted: int = 0,
) -> list[list[Hypothesis]]:
    """Returns the best texts of at most `new` tokens behind each state, of which there are as many
    copies as beams. `counted` tokens in front of each text count for its length."""
    static = decoder.spec, settings.num_beams, bucket_size(new, CHUNK), decoder.vocab_limit
    limits = SearchLimits.of(settings, new, end, counted)
    return hypotheses(_search(*static, decoder.params, state, limits), end)


class SearchLimits(NamedTuple):
    """How texts end and how they are ranked, as scalars that one program serves. `counted` is how
    many tokens in front of those searched for count for a text's length."""

    new: Int[Array, ""] | int
    end: Int[Array, ""] | int
    length_penalty: Float[Array, ""] | float
    stops_early: Bool[Array, ""] | bool
    counted: Int[Array, ""] | int

    @classmethod
    def of(cls, settings: BeamSettings, new: int, end: int, counted: int = 0) -> "SearchLimits":
        """Returns the limits of a search for at most `new` tokens."""
        penalty = float(settings.length_penalty)
        return cls(new, end, penalty, settings.early_stopping, counted)

    def score(self, total: Float[Array, "*B"], length: Int[Array, ""]) -> Float[Array, "*B"]:
        """Returns the scores of texts of `length` tokens."""
        length = (length + self.counted).astype(jnp.float32)
        return total / length**self.length_penalty


class Beams(NamedTuple):
    """B searches of K beams each, in the middle of searching for texts of N tokens."""

    token: Int[Array, "B K"]
    total: Float[Array, "B K"]  # sum of the log-probabilities
    tokens: Int[Array, "B K N"]
    done_tokens: Int[Array, "B K N"]
    done_length: Int[Array, "B K"]
    done_score: Float[Array, "B K"]  # -inf: nothing is finished in this place yet
    is_open: Bool[Array, "B"]  # whether the search goes on
    at: Int[Array, ""]
    recent: Cache | None  # the continuations' keys and values, B * K rows


def hypotheses(beams: Beams, end: int) -> list[list[Hypothesis]]:
    """Returns each search's hypotheses, the best first."""
    beams = jax.device_get(beams._replace(recent=None))
    results = []
    for tokens, lengths, scores in zip(beams.done_tokens, beams.done_length, beams.done_score):
        rows = [row[:length] for row, length in zip(tokens, lengths)]
        rows = [row[:-1] if row[-1:].tolist() == [end] else row for row in rows]
        found = zip(rows, scores.tolist(), strict=True)
        results.append([(row, score) for row, score in found if score != -np.inf])
    return results


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _search(
    spec: ModelSpec,
    num_beams: int,
    slots: int,
    vocab_limit: int,
    params: dict,
    state: DecodeState,
    limits: SearchLimits,
) -> Beams:
    model, blocks, rows = spec.bind(params), decoding.blocks_of(params), state.token.shape[0]
    table = model.vocabulary.table()

    def extend(token, recent, at):
        position = state.position + at
        x, recent = decoding.extend(
            model, blocks, token, position, state.cache, recent, at, state.memory
        )
        return decoding.next_logits(model, x, table), recent

    recent = empty_cache(spec.config, rows, slots, spec.rules)
    return search(extend, state.token, recent, num_beams, limits, vocab_limit)


def search(
    extend: Extend,
    token: Int[Array, "R"],
    recent: Cache,
    k: int,
    limits: SearchLimits,
    vocab_limit: int,
) -> Beams:
    """Returns R / k searches with their hypotheses. The rows of `token`, with which all texts
    begin, are k copies for each search; `recent` has room for `limits.new` tokens."""
    searches, slots = token.shape[0] // k, recent.positions.shape[1]

    def step(beams: Beams) -> Beams:
        logits, recent = extend(beams.token.reshape(-1), beams.recent, beams.at)
        logits = jax.sharding.reshard(logits, jax.P(None, None))
        logprobs = limit_vocab(jax.nn.log_softmax(logits, axis=-1), vocab_limit)
        totals = beams.total[:, :, None] + logprobs.reshape(searches, k, -1)
        total, best = jax.lax.top_k(totals.reshape(searches, -1), 2 * k)
        parent, token = best // logprobs.shape[-1], (best % logprobs.shape[-1]).astype(jnp.int32)
        tokens = _gather(beams.tokens, parent).at[:, :, beams.at].set(token)
        length = beams.at + 1
        ends = (token == limits.end) | (length == limits.new)
        score = jnp.where(ends, limits.score(total, length), -jnp.inf)
        beams = _finish(beams, tokens, length, score[:, :k])
        total, going = jax.lax.top_k(jnp.where(ends, -jnp.inf, total), k)
        rows = _gather(parent, going) + k * jnp.arange(searches)[:, None]
        recent = jax.tree.map(partial(_take_rows, rows=rows.reshape(-1)), recent)
        worst = beams.done_score.min(axis=1)
        is_open = beams.is_open & (limits.score(total[:, 0], length) > worst)
        is_open &= ~(limits.stops_early & (worst > -jnp.inf))
        return beams._replace(
            token=_gather(token, going),
            total=total,
            tokens=_gather(tokens, going),
            is_open=is_open,
            at=length,
            recent=recent,
        )

    none = jnp.full((searches, k), -jnp.inf)
    empty = jnp.zeros((searches, k, slots), jnp.int32)
    beams = Beams(
        token=jax.sharding.reshard(token, jax.P(None)).reshape(searches, k),
        total=none.at[:, 0].set(0.0),  # at first all beams of a search are the same
        tokens=empty,
        done_tokens=empty,
        done_length=empty[:, :, 0],
        done_score=none,
        is_open=none[:, 0] < 0,
        at=jnp.int32(0),
        recent=recent,
    )
    return jax.lax.while_loop(lambda b: b.is_open.any() & (b.at < limits.new), step, beams)


def _finish(
    beams: Beams, tokens: Int[Array, "B C N"], length: Int[Array, ""], score: Float[Array, "B K"]
) -> Beams:
    """Returns the beams with the best of what is finished already and of the first K `tokens`; a
    `score` of -inf is not finished. A search that is not open any more stays as it is."""
    k = score.shape[1]
    score = jnp.where(beams.is_open[:, None], score, -jnp.inf)
    done_score, best = jax.lax.top_k(jnp.concatenate([beams.done_score, score], axis=1), k)
    lengths = jnp.concatenate([beams.done_length, jnp.full(score.shape, length)], axis=1)
    every = jnp.concatenate([beams.done_tokens, tokens[:, :k]], axis=1)
    return beams._replace(
        done_tokens=_gather(every, best), done_length=_gather(lengths, best), done_score=done_score
    )


def _gather(a: Array, columns: Int[Array, "B C"]) -> Array:
    """Returns the chosen columns of each row, [B, C, ...]."""
    return jnp.take_along_axis(a, columns.reshape(columns.shape + (1,) * (a.ndim - 2)), axis=1)


def _take_rows(a: Array, rows: Int[Array, "R"]) -> Array:
    return a.at[rows].get(out_sharding=jax.typeof(a).sharding.spec)
