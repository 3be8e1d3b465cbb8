"""A model with a KV cache: the start of a text at once, then one token at a time.

A cache is read by XLA's attention, as its queries are too few for a flash kernel to pay.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int

from jaxgpt.config import ModelConfig
from jaxgpt.config.experts import layers_with
from jaxgpt.model.attention import Attention
from jaxgpt.model.encoder_decoder import EncoderDecoder
from jaxgpt.model.gpt import GPT, make_mask
from jaxgpt.model.relative import bias_of
from jaxgpt.ops.cache import Cache, KeysValues, write_column
from jaxgpt.ops.cached_attention import sharded_cached
from jaxgpt.ops.mask import AttentionMask
from jaxgpt.parameters.weights import turned
from jaxgpt.system.trees import leaves_by_path


class Memory(NamedTuple):
    """What the layers of an encoder-decoder's decoder read of its source: keys and values of each,
    and the segment of each of the source's tokens, 0 for padding."""

    layers: tuple[KeysValues, ...]
    segments: Int[Array, "B S"]


def split_layers(params: dict, cfg: ModelConfig) -> dict:
    """Returns `params` with `blocks`, the decoder's of an encoder-decoder, as a tuple of each
    layer's own arrays, and the tables as `extend` reads them."""
    if "decoder" in params:
        return turned(params) | {"decoder": _split(params["decoder"], cfg)}
    return _split(turned(params), cfg)


def _split(stack: dict, cfg: ModelConfig) -> dict:
    def row(stacked, i):
        spec = jax.typeof(stacked).sharding.spec
        stacked = jax.sharding.reshard(stacked, jax.P(None, *spec[1:]))  # of all stages' layers
        return jax.sharding.reshard(stacked[i], jax.P(*spec[1:]))

    layers: list[dict] = [{} for _ in range(cfg.num_layers)]
    for path, stacked in leaves_by_path(stack["blocks"]).items():
        for i, layer in enumerate(layers_with(path, cfg)):
            layers[layer][path] = row(stacked, i)
    return stack | {"blocks": tuple(unflatten_dict(layer, sep="/") for layer in layers)}


def blocks_of(params: dict) -> Sequence[dict]:
    """Returns the parameters of each layer that decoding runs, from `split_layers`."""
    return params.get("decoder", params)["blocks"]


def read_sources(
    model: EncoderDecoder,
    layers: Sequence[dict],
    sources: Int[Array, "B S"],
    segments: Int[Array, "B S"] | None = None,
) -> Memory:
    """Returns what `prefill` and `extend` read of the sources, computed once; segment 0 is padding,
    and without segments there is none."""
    encoded, _ = model.encode(sources, segments)
    segments = jnp.ones_like(sources) if segments is None else segments
    made = (_block(model, i, params) for i, params in enumerate(layers))
    return Memory(tuple(block.cross_attention.keys_values(encoded) for block in made), segments)


def prefill(
    model: GPT | EncoderDecoder,
    layers: Sequence[dict],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    memory: Memory | None = None,
    prefix: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], tuple[KeysValues, ...]]:
    """Returns the hidden states of the start of a text, before the last norm, and each layer's
    keys and values. `layers` holds each block's parameters (see `split_layers`): a decoder does
    little for each weight it reads, and a stack of layers would have it copy them first. In front
    of `prefix` tokens see each other.
    """
    stack = model.stack
    mask = make_mask(tokens.shape, positions, None, prefix, stack.reach, model.rules)
    bias = bias_of(stack.relative, mask, in_order=False)
    return _through_layers(
        model,
        layers,
        stack.embed(model.vocabulary.embed(tokens), positions),
        lambda i, attention, x: _attend_start(attention, x, mask, bias),
        memory,
    )


def extend(
    model: GPT | EncoderDecoder,
    layers: Sequence[dict],
    token: Int[Array, "B"],
    position: Int[Array, "B"],
    cache: Cache,
    recent: Cache,
    at: Int[Array, ""],
    memory: Memory | None = None,
) -> tuple[Float[Array, "B D"], Cache]:
    """Returns the hidden state of one more token of each row, before the last norm, and
    `recent` with it in column `at`. What comes before is in the cache and in `recent`.
    """
    stack, positions = model.stack, recent.positions.at[:, at].set(position)
    biases = None
    if stack.relative is not None:
        slots = cache.positions, positions
        biases = [stack.relative(position[:, None], held)[:, :, 0] for held in slots]

    def attend(i, attention, x):
        old, new = (cache.layers[i], cache.positions), (recent.layers[i], positions)
        return _attend_cached(attention, x, position, old, new, at, biases)

    x = stack.embed(model.vocabulary.embed(token[:, None]), position[:, None])
    x, grown = _through_layers(model, layers, x, attend, memory)
    return x[:, 0], Cache(grown, positions)


def _attend_start(attention: Attention, x, mask: AttentionMask, bias):
    """Returns the attended x of a text's start, and its keys and values for a cache."""
    q, k, v = attention.heads(x, mask.q_positions)
    mask = mask.within(attention.window, attention.patterns[True])
    out = attention.out(attention.attend_start(q, k, v, mask, bias=bias))
    return out, KeysValues(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))


def _attend_cached(
    attention: Attention,
    x: Float[Array, "B 1 D"],
    position: Int[Array, "B"],
    cache: tuple[KeysValues, Int[Array, "B S"]],
    recent: tuple[KeysValues, Int[Array, "B C"]],
    at: Int[Array, ""],
    biases: Sequence[Float[Array, "B N _"]] | None,
) -> tuple[Float[Array, "B 1 D"], KeysValues]:
    """Returns one more token of each row attended to all before it, and `recent` with it in column
    `at`. The positions are those of the slots, this token's included, and `biases` are added to the
    scores of the two.
    """
    q, k, v = attention.heads(x, position[:, None])
    new = KeysValues(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    grown = write_column(recent[0], new, at)
    attend = sharded_cached(
        attention.rules,
        scale=attention.scale,
        window=attention.window,
        pattern=attention.patterns[True],
    )
    parts = [(*cache[0], cache[1]), (*grown, recent[1])]
    return attention.out(attend(q[:, 0], parts, position, biases)[:, None]), grown


def _through_layers(model, layers: Sequence[dict], x, attend: Callable, memory: Memory | None):
    caches = []
    for i, params in enumerate(layers):
        cross = () if memory is None else (functools.partial(_read_memory, memory, i),)
        x, cache = _block(model, i, params).decoding(x, functools.partial(attend, i), *cross)
        caches.append(cache)
    return x, tuple(caches)


def _read_memory(memory: Memory, i: int, cross_attention, x):
    return cross_attention.read(x, memory.layers[i], memory.segments)


def _block(model, i: int, params: dict):
    return model.stack.blocks.block(i, nnx.State(params))


def next_logits(model: GPT | EncoderDecoder, x: Float[Array, "B D"], table) -> Float[Array, "B V"]:
    """Returns the logits of the last position before the final norm."""
    x, vocabulary = model.stack.final_norm(x), model.vocabulary
    x = vocabulary.transformed(x[:, None])[:, 0]
    return vocabulary.finished(vocabulary.storage.few_logits(x, table, model.rules(None, "vocab")))
