"""What a model thinks of a text that is there already, and of the tokens it did not draw."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.inference.decode import PROMPT, Decoder, best_of, bucket
from jaxgpt.model import ModelSpec


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities, natural logarithms under the model itself (no filter, temperature 1), of T
    tokens, and the likeliest ids in the place of each, best first."""

    tokens: np.ndarray  # float32 [T]
    best_ids: np.ndarray  # int32 [T, BEST]
    best: np.ndarray  # float32 [T, BEST]


def score_prompt(decoder: Decoder, prompt: np.ndarray) -> Scores:
    """Returns the scores of a prompt's tokens but the first, which follows nothing."""
    count = len(prompt) - 1
    padded = np.zeros((1, bucket(len(prompt), PROMPT)), np.int32)
    padded[0, : len(prompt)] = prompt
    found = jax.device_get(_score(decoder.spec, decoder.drawable, decoder.params, padded))
    return Scores(*(part[:count] for part in found))


@partial(jax.jit, static_argnums=(0, 1))
def _score(
    spec: ModelSpec, drawable: int, params: dict, tokens: Int[Array, "1 T"]
) -> tuple[Float[Array, "T"], Int[Array, "T K"], Float[Array, "T K"]]:
    """PROMPT positions at a time, so that logits are never whole."""
    model = spec.bind(params)
    table, positions = model.table(), jnp.arange(tokens.shape[1])[None]
    x, _ = model.prefill(params["blocks"], tokens, positions)
    x = model.final_norm(x).reshape(-1, 1, PROMPT, x.shape[-1])
    following = jnp.roll(tokens[0], -1).reshape(-1, PROMPT)

    def part(given):
        x, following = given
        logits = jax.sharding.reshard(model.logits(x, table)[0], jax.P(None, None))
        return best_of(logits, following, drawable)

    found = jax.lax.map(part, (x, following))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)
