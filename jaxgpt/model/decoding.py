"""GPT with a KV cache: the start of a text at once, then one token at a time."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.model.cache import Cache, KeysValues
from jaxgpt.model.gpt import GPT
from jaxgpt.parameters.weights import turned


def split_layers(params: dict) -> dict:
    """Returns `params` with `blocks` as a tuple of each layer's own arrays, and the tables as
    `extend` reads them."""

    def layer(stacked, i):
        spec = jax.typeof(stacked).sharding.spec
        return jax.sharding.reshard(stacked[i], jax.P(*spec[1:]))

    count = jax.tree.leaves(params["blocks"])[0].shape[0]
    blocks = (jax.tree.map(lambda a, i=i: layer(a, i), params["blocks"]) for i in range(count))
    return turned(params) | {"blocks": tuple(blocks)}


def prefill(
    model: GPT, layers: Sequence[dict], tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D"], tuple[KeysValues, ...]]:
    """Returns the hidden states of the start of a text, before the last norm, and each layer's
    keys and values. `layers` holds each block's parameters (see `split_layers`): a decoder does
    little for each weight it reads, and a stack of layers would have it copy them first.
    """
    return _through_layers(
        model,
        layers,
        model.embed(tokens, positions),
        lambda i, attention, x: attention.prefill(x, positions),
    )


def extend(
    model: GPT,
    layers: Sequence[dict],
    token: Int[Array, "B"],
    position: Int[Array, "B"],
    cache: Cache,
    recent: Cache,
    at: Int[Array, ""],
) -> tuple[Float[Array, "B D"], Cache]:
    """Returns the hidden state of one more token of each row, before the last norm, and
    `recent` with it in column `at`. What comes before is in the cache and in `recent`.
    """
    positions = recent.positions.at[:, at].set(position)

    def attend(i, attention, x):
        old, new = (cache.layers[i], cache.positions), (recent.layers[i], positions)
        return attention.extend(x, position, old, new, at)

    x = model.embed(token[:, None], position[:, None])
    x, grown = _through_layers(model, layers, x, attend)
    return x[:, 0], Cache(grown, positions)


def _through_layers(model: GPT, layers: Sequence[dict], x, attend: Callable):
    structure, caches = jax.tree.structure(nnx.state(model.blocks)), []
    for i, params in enumerate(layers):
        state = jax.tree.unflatten(structure, jax.tree.leaves(params))
        block = nnx.merge(model.graphdefs[i % len(model.layer_windows)], state)
        x, cache = block.decoding(x, functools.partial(attend, i))
        caches.append(cache)
    return x, tuple(caches)


def next_logits(model: GPT, x: Float[Array, "B D"], table) -> Float[Array, "B V"]:
    """Returns `logits` of the last position before the final norm."""
    x = model.final_norm(x)
    logits = model.storage.few_logits(x, table, model.rules(None, "vocab"))
    return model.finish(logits, jnp.arange(logits.shape[-1]))
