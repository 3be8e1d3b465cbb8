"""What stands in place of `[MASK]`: an encoder's likeliest tokens, from both sides of the text."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.inference.decode import bucket_size, limit_vocab, pad_rows
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.base import ROLES
from jaxgpt.tokenizer.roles import framed, role_id

MASK_BLOCK = 8  # masks of one text are filled up to a multiple of this


class Masked(NamedTuple):
    """A text with masks as an encoder reads it: ids, their types, and where the masks are."""

    ids: np.ndarray
    types: np.ndarray
    places: np.ndarray


def encode_masked(tokenizer: Tokenizer, text: str, context: int, what: str = "--prompt") -> Masked:
    """Returns the tokens of a text with masks, in the frame of special tokens that its model
    expects. A mask may be spelled `[MASK]`, `<mask>` or as the tokenizer does.

    Raises:
      BadInput: if the tokenizer has no mask token, the text has none, or is longer than `context`.
    """
    mask = role_id(tokenizer, "filling masks", "mask")
    own = [name for name, token in tokenizer.special.items() if token == mask]
    for name in ROLES["mask"] if own else ():
        text = text.replace(name, own[0])
    ids, types = framed(tokenizer, tokenizer.encode_with_special(text))
    places = np.flatnonzero(np.array(ids) == mask)
    if not len(places):
        raise BadInput(
            f"{what} has no {ROLES['mask'][0]}: the model is an encoder, which does not continue"
            " a text but fills in what is masked; write"
            f" {what}='The capital of {ROLES['mask'][0]} is Paris.'"
        )
    if len(ids) > context:
        raise BadInput(
            f"{what} has {len(ids)} tokens, more than the model's context of {context}"
            " (model.max_seq_len); shorten it"
        )
    return Masked(np.array(ids, np.int32), np.array(types, np.int32), places)


def fill_masks(
    spec: ModelSpec, params: dict, tokenizer: Tokenizer, texts: Sequence[Masked], count: int
) -> list[list[list[tuple[int, float]]]]:
    """Returns, for each mask of each text, the `count` likeliest (token, probability), best first;
    all where `count` is 0. Each mask is filled as if the others stayed masks. Call it under
    `jax.set_mesh`."""
    size = tokenizer.vocab_size
    places = np.zeros((len(texts), bucket_size(max(len(t.places) for t in texts), MASK_BLOCK)))
    for row, text in zip(places, texts, strict=True):
        row[: len(text.places)] = text.places
    arrays = {
        "tokens": pad_rows([text.ids for text in texts]),
        "segments": pad_rows([np.ones_like(text.ids) for text in texts]),
    }
    if spec.model.type_vocab_size:
        arrays["types"] = pad_rows([text.types for text in texts])
    number = min(count or size, size)
    ids, found = _fill(spec, number, size, params, arrays, places.astype(np.int32))
    ids, found = jax.device_get((ids, found))
    return [
        [
            list(zip(ids[i, j].tolist(), found[i, j].tolist(), strict=True))
            for j in range(len(text.places))
        ]
        for i, text in enumerate(texts)
    ]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _fill(
    spec: ModelSpec,
    count: int,
    vocab_limit: int,
    params: dict,
    arrays: dict[str, Int[Array, "B T"]],
    places: Int[Array, "B M"],
) -> tuple[Int[Array, "B M C"], Float[Array, "B M C"]]:
    spec = spec.for_decoding()
    model = spec.bind(params)
    x, _ = model.hidden(arrays["tokens"], **{n: a for n, a in arrays.items() if n != "tokens"})
    x = jnp.take_along_axis(jax.sharding.reshard(x, jax.P()), places[:, :, None], axis=1)
    logits = model.vocabulary.logits(x, model.vocabulary.table())
    probabilities = jax.nn.softmax(jax.sharding.reshard(logits, jax.P()), axis=-1)
    limited = limit_vocab(probabilities.reshape(-1, probabilities.shape[-1]), vocab_limit)
    found, ids = jax.lax.top_k(limited.reshape(probabilities.shape), count)
    return ids.astype(jnp.int32), found


def shown_token(tokenizer: Tokenizer, token: int) -> str:
    """Returns a token's text on one line: `bytes:\\xe2\\x82` for a part of a character, the name of
    a special token, and control characters escaped."""
    text = tokenizer.decode([token])
    if not text:
        text = next((n for n, i in tokenizer.special.items() if i == token), "")
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token))
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
