"""The log-probabilities of a text that is given, instead of generated."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxgpt.inference.decode import PROMPT_BLOCK, Decoder, Logprobs, pad_rows, token_logprobs
from jaxgpt.model import ModelSpec, decoding


def score(decoder: Decoder, rows: Sequence[np.ndarray]) -> list[Logprobs]:
    """Returns the log-probabilities of each row's tokens but the first, which follows nothing."""
    scored = jax.device_get(
        _score(decoder.spec, decoder.vocab_limit, decoder.params, pad_rows(rows))
    )
    return [Logprobs(*(array[i, : len(row) - 1] for array in scored)) for i, row in enumerate(rows)]


@partial(jax.jit, static_argnums=(0, 1))
def _score(spec: ModelSpec, vocab_limit: int, params: dict, tokens: Int[Array, "B T"]) -> Logprobs:
    """Computes the logits of PROMPT_BLOCK positions at a time, so that they fit in memory."""
    model, batch = spec.bind(params), tokens.shape[0]
    table, positions = (
        model.vocabulary.table(),
        jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    )
    x, _ = decoding.prefill(model, params["blocks"], tokens, positions)

    def score_block(block):
        x, targets = block
        logits = jax.sharding.reshard(model.vocabulary.logits(x, table), jax.P(None, None, None))
        return token_logprobs(logits.reshape(-1, logits.shape[-1]), targets.ravel(), vocab_limit)

    def split(a):
        return a.reshape(batch, -1, PROMPT_BLOCK, *a.shape[2:]).swapaxes(0, 1)

    def join(a):
        a = a.reshape(-1, batch, PROMPT_BLOCK, *a.shape[2:])
        return a.swapaxes(0, 1).reshape(tokens.shape + a.shape[3:])

    targets = jnp.roll(tokens, -1, axis=1)
    scored = jax.lax.map(score_block, (split(model.stack.final_norm(x)), split(targets)))
    return jax.tree.map(join, scored)
