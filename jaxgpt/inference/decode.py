"""Prefill, then one `lax.scan` over new tokens with a KV cache."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jaxgpt.config import BadInput
from jaxgpt.inference.samplers import Sampling, draw
from jaxgpt.model import ModelSpec
from jaxgpt.model.cache import empty
from jaxgpt.tokenizer import Tokenizer

BUCKET = 64  # prompts are padded to a multiple, so that few shapes are compiled


def make_decode(spec: ModelSpec, sampling: Sampling, max_new_tokens: int) -> Callable:
    """Returns the jitted `(params, prompts, lengths, keys) -> new tokens`.

    `prompts` is [B, P], padded on the right to P, row b holding `lengths[b]` tokens. Padding is
    never seen: slot p of the cache is overwritten when position p is generated, and until then
    it lies in every query's future. Row b's draw at position p depends on (keys[b], p) alone.
    """
    spec = spec.for_decoding()

    def decode(
        params: dict, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], keys: Key[Array, "B"]
    ) -> Int[Array, "B new"]:
        model = spec.bind(params)
        batch, width = prompts.shape

        def pick(logits, positions, seen):
            logits = jax.sharding.reshard(logits, jax.P(None, None))
            step_keys = jax.vmap(jax.random.fold_in)(keys, positions)
            token = draw(logits, step_keys, sampling, seen)
            return token, seen.at[jnp.arange(batch), token].set(True)

        cache = empty(spec.cfg, batch, width + max_new_tokens, spec.rules)
        positions = jnp.broadcast_to(jnp.arange(width), prompts.shape)
        logits, cache = model.extend(prompts, positions, cache, lengths - 1)
        real = positions < lengths[:, None]
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(batch)[:, None], prompts].max(real)
        first, seen = pick(logits, lengths, seen)

        def next_token(carry, _):
            token, position, cache, seen = carry
            logits, cache = model.extend(
                token[:, None], position[:, None], cache, jnp.zeros_like(position)
            )
            following, seen = pick(logits, position + 1, seen)
            return (following, position + 1, cache, seen), token

        carry = (first, lengths, cache, seen)
        (last, *_), tokens = jax.lax.scan(next_token, carry, length=max_new_tokens - 1)
        return jnp.concatenate([tokens, last[None]]).T

    return jax.jit(decode)


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """Returns the prompt's ids; an empty prompt is an end-of-text, which starts a document."""
    ids = tokenizer.encode(prompt)
    return ids if len(ids) else np.array([tokenizer.end_of_text], np.int32)


def check_length(prompt_length: int, max_new_tokens: int, max_seq_len: int) -> None:
    """Raises `BadInput` where prompt and continuation do not fit the context."""
    if prompt_length > max_seq_len:
        raise BadInput(
            f"the prompt has {prompt_length} tokens, more than the model's context of"
            f" {max_seq_len} (model.max_seq_len); shorten it"
        )
    if prompt_length + max_new_tokens > max_seq_len:
        raise BadInput(
            f"a prompt of {prompt_length} tokens and --max_new_tokens={max_new_tokens} exceed the"
            f" model's context of {max_seq_len} (model.max_seq_len); ask for at most"
            f" {max_seq_len - prompt_length} new tokens"
        )


def generate(
    decode: Callable, params: dict, prompts: Sequence[np.ndarray], max_seq_len: int, seed: int
) -> np.ndarray:
    """Returns the new tokens of each prompt, int32 [B, new]; sample b uses key (seed, b)."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = min(-(-int(lengths.max()) // BUCKET) * BUCKET, max_seq_len)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = fold(jax.random.key(seed), jnp.arange(len(prompts)))
    return np.asarray(jax.device_get(decode(params, padded, lengths, keys)))


def until(tokens: np.ndarray, end: int) -> np.ndarray:
    """Returns the tokens in front of the first `end`, all where there is none."""
    found = np.flatnonzero(tokens == end)
    return tokens[: found[0]] if len(found) else tokens
