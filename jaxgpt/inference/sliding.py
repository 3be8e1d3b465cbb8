"""Texts that grow beyond the context of a model whose positions end there.

The model reads a window of the text, at positions from 0 on; at first that is the whole text. When
the window holds T = `model.max_seq_len` tokens or more, it is cut to its last T // 2, which are
read anew. So every token is drawn from fewer than T tokens in front of it and, once the window has
moved, from at least T // 2. With T = 8 and the prompt abcde, the window in brackets:

    [abcde]          f, g, h are drawn
    abcd[efgh]       i, j, k, l
    abcdefgh[ijkl]   ...

Windows depend on nothing but the prompt's length: not on the rows beside it, nor on how many tokens
are drawn between two returns to the host. The repetition penalty counts the whole text.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxgpt.config import ModelConfig
from jaxgpt.inference.decode import (
    CHUNK,
    Decoder,
    DecodeState,
    bucket_size,
    decode_chunks,
    has_sliding_context,
)
from jaxgpt.inference.requests import Sampling
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput


def announce(cfg: ModelConfig) -> bool:
    """Says how a model's texts go on beyond its context; returns whether that is by windows that
    are read anew, and not by its own attention windows. Raises `BadInput` if the context is one
    token."""
    context = cfg.max_seq_len
    if has_sliding_context(cfg):
        say("slide     every layer has an attention window, which slides by itself")
        return False
    if context < 2:
        raise BadInput(f"--beyond_context=slide: a context of {context} token has no half to keep")
    say(
        f"slide     a text that fills the context of {context} tokens goes on from its last"
        f" {context // 2}, read anew"
    )
    return True


def window_start(start: int, length: int, context: int) -> int:
    """Returns at which token the window of a text of `length` tokens starts that has started at
    `start` so far."""
    return start if length - start < context else length - context // 2


def slide(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    new: int,
    sampling: Sequence[Sampling],
    keys: Key[Array, "B"],
    chunk: int = CHUNK,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields what `stream` yields, for texts of any length. Up to the first cut the tokens are
    those of `stream`."""
    context = decoder.spec.model.max_seq_len
    texts, starts = list(prompts), [0] * len(prompts)
    while new > 0:
        lengths = [len(text) for text in texts]
        starts = [window_start(*pair, context) for pair in zip(starts, lengths, strict=True)]
        longest = max(length - start for length, start in zip(lengths, starts, strict=True))
        count = min(new, context - longest)  # until the first row's window is full
        state = read_windows(decoder, texts, starts, sampling, keys, bucket_size(context, 16))
        for tokens, logprobs in decode_chunks(decoder, state, longest, count, chunk=chunk):
            yield tokens, logprobs
            texts = [np.concatenate(pair) for pair in zip(texts, tokens, strict=True)]
        new -= count


def read_windows(
    decoder: Decoder,
    texts: Sequence[np.ndarray],
    starts: Sequence[int],
    sampling: Sequence[Sampling],
    keys: Key[Array, "B"],
    slots: int,
) -> DecodeState:
    """Returns the state after reading each text from its token in `starts` on, with a cache of
    `slots` slots."""
    windows = [text[start:] for text, start in zip(texts, starts, strict=True)]
    state = decoder.prefill(windows, sampling, _window_keys(keys, np.array(starts)), 0, slots)
    seen = np.zeros(state.seen.shape, bool)
    for row, text in zip(seen, texts, strict=True):
        row[text] = True
    return state._replace(seen=jax.device_put(seen, state.seen.sharding))


@jax.jit
@jax.vmap
def _window_keys(key, start):
    """Draws fold a position into a row's key: a window that has moved would repeat them. No draw is
    at position 0."""
    moved = jax.random.fold_in(jax.random.fold_in(key, 0), start)
    return jnp.where(start == 0, key, moved)
