"""Token generation: prefill, then a `lax.scan` over new tokens with a KV cache.

The scan generates one chunk of tokens at a time. One compiled program then serves any number of new
tokens, and between two chunks the caller can print, stop at a stop string or admit a new request.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.config import ModelConfig
from jaxgpt.config.context import CACHE_BLOCK
from jaxgpt.inference.requests import Sampling
from jaxgpt.inference.samplers import BatchSampling, next_token
from jaxgpt.model import ModelSpec, decoding
from jaxgpt.model.stacked.blocks import layer_windows
from jaxgpt.ops.cache import UNWRITTEN, Cache, empty_cache, first_slots, write_recent
from jaxgpt.parameters.bfloat16 import product_dtype
from jaxgpt.parameters.weights import as_read
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer

PROMPT_BLOCK = 16  # padded prompts are a multiple of this
CHUNK = 20  # tokens generated between two returns to the host
SMALL_SHARE = 1 / 16  # of the weights' bytes; a step that reads so much more is as fast
NUM_TOP = 5  # alternatives that are reported for each token
# Weights in few bits are read a third faster in whole AVX-512 registers than in XLA's usual halves
CPU_OPTIONS = {"xla_cpu_prefer_vector_width": 512}


class DecodeState(NamedTuple):
    """What the next decoding step of B sequences needs.

    `token` is each sequence's last one; it has position `position` and is not in the cache yet.
    """

    cache: Cache
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    seen: Bool[Array, "B V"]  # which tokens the sequence contains
    keys: Key[Array, "B"]
    sampling: BatchSampling
    memory: decoding.Memory | None = None  # of an encoder-decoder: what it has read of the sources


class Logprobs(NamedTuple):
    """The natural log-probabilities that the model itself (no filter, temperature 1) gave to
    tokens, and the NUM_TOP likeliest ids in the place of each, the likeliest first."""

    chosen: Float[Array, "*B"]
    top_ids: Int[Array, "*B K"]
    top: Float[Array, "*B K"]

    def top_pairs(self) -> list[list[tuple[int, float]]]:
        """Returns the likeliest (id, log-probability) in the place of each token of one row."""
        rows = zip(self.top_ids.tolist(), self.top.tolist(), strict=True)
        return [list(zip(*row, strict=True)) for row in rows]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model's parameters laid out for decoding, and the programs that use them.

    The token sampled for row b at position p depends only on the row's own tokens and on
    (keys[b], p). Call the methods under `jax.set_mesh`.
    """

    spec: ModelSpec
    params: dict
    vocab_limit: int
    slides: bool = False  # texts may grow beyond the context: see `inference.sliding`
    whole_prompts: bool = False  # a prompt's tokens see each other, as objective=prefix_lm trains

    @classmethod
    def of(cls, spec: ModelSpec, params: dict, vocab_limit: int) -> "Decoder":
        """Returns the decoder of a model with its training `params`. It samples only ids below
        `vocab_limit`, the tokenizer's size: the model's vocabulary may be larger."""
        params = _decoding_params(spec.for_decoding(), params)
        config, _ = as_read(spec.config, {}, "float32")
        whole, spec = config.objective == "prefix_lm", spec.for_decoding()
        spec = dataclasses.replace(spec, config=config)
        return cls(spec, params, vocab_limit, whole_prompts=whole)

    def prefill(
        self,
        prompts: Sequence[np.ndarray],
        sampling: Sequence[Sampling],
        keys: Key[Array, "B"],
        new: int,
        slots: int = 0,
        memory: decoding.Memory | None = None,
    ) -> DecodeState:
        """Returns the state after reading the prompts: of an encoder-decoder the starts of targets,
        and the `memory` of their sources. Its cache has room for `new` more tokens, or
        `slots` slots in all. Generating past the context (see `check_length`) makes a row's own
        tokens meaningless but does not affect other rows."""
        padded, cfg = pad_rows(prompts), self.spec.model
        width = padded.shape[1]
        room = width + round_up(new, CHUNK)
        if has_sliding_context(cfg):
            room = min(room, max(width, round_up(cfg.window, CACHE_BLOCK)))
        slots = round_up(slots or room, CACHE_BLOCK)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        rows = padded, lengths, keys, BatchSampling.of(sampling)
        prefix = lengths if self.whole_prompts else None
        return _prefill(self.spec, slots, self.params, *rows, memory, prefix)

    def decode(
        self, state: DecodeState, count: int = CHUNK, reach: int = 0, with_top: bool = False
    ) -> tuple[DecodeState, jax.Array, Logprobs]:
        """Returns the state after `count` more tokens of each row, those tokens [B, count] and
        their log-probabilities. Donates `state`.

        `reach` > 0 states that no row has more tokens than that yet, so that less of the cache is
        read. The top log-probabilities are zeros unless `with_top`; the compiled program is the
        same either way.
        """
        slots = state.cache.positions.shape[1]
        smallest = smallest_span(self.params, state.cache)
        span = slots if reach <= 0 else min(slots, bucket_size(reach, smallest))
        return _decode(self.spec, count, span, self.vocab_limit, self.params, state, with_top)


def smallest_span(params: dict, cache: Cache) -> int:
    """Returns how many slots of a cache are read at least: each span is a program to compile, and
    reading fewer slots than `SMALL_SHARE` of the weights' bytes would hardly save time."""
    weights, slots = (sum(a.nbytes for a in jax.tree.leaves(tree)) for tree in (params, cache))
    affordable = SMALL_SHARE * weights * cache.positions.shape[1] / slots / CACHE_BLOCK
    return CACHE_BLOCK * 2 ** max(1, math.floor(math.log2(max(affordable, 1))))


def pad_rows(rows: Sequence[np.ndarray]) -> Int[np.ndarray, "B T"]:
    """Returns the rows of tokens padded at the end with id 0 to a common bucket size."""
    padded = np.zeros((len(rows), bucket_size(max(map(len, rows)), PROMPT_BLOCK)), np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def has_sliding_context(cfg: ModelConfig) -> bool:
    """Says whether texts may grow past `max_seq_len`: positions are relative (RoPE, or none) and
    every layer has an attention window."""
    return cfg.position in ("rope", "none") and all(layer_windows(cfg))


def check_length(prompt_length: int, new: int, cfg: ModelConfig, remedy: str = "") -> None:
    """Raises `BadInput`, with a `remedy`, if the prompt and `new` tokens exceed a context that does
    not slide."""
    context = cfg.max_seq_len
    if has_sliding_context(cfg):
        return
    if prompt_length > context:
        raise BadInput(
            f"the prompt has {prompt_length} tokens, more than the model's context of"
            f" {context} (model.max_seq_len); shorten it{remedy}"
        )
    if prompt_length + new > context:
        raise BadInput(
            f"a prompt of {prompt_length} tokens and --max_new_tokens={new} exceed the"
            f" model's context of {context} (model.max_seq_len); ask for at most"
            f" {context - prompt_length} new tokens{remedy}"
        )


def sample_keys(seeds: Sequence[tuple[int, int]]) -> Key[Array, "B"]:
    """Returns the random key of each (seed, sample index)."""
    return _sample_keys(*np.array(seeds, np.uint32).T)


@jax.jit  # compiled once: op by op it took longer than the prompt
@jax.vmap
def _sample_keys(seed, index):
    return jax.random.fold_in(jax.random.key(seed), index)


def generate(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    new: int,
    sampling: Sampling,
    seed: int = 0,
    end: int = -1,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `new` tokens for each prompt and their log-probabilities, [B, new]; row b uses the
    key of (seed, b). Stops early, with fewer columns, once every row contains the token `end`.
    """
    check_length(max(map(len, prompts)), new, decoder.spec.model)
    keys = sample_keys([(seed, b) for b in range(len(prompts))])
    chunks = list(stream(decoder, prompts, new, [sampling] * len(prompts), keys, end))
    return tuple(np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))


def stream(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    new: int,
    sampling: Sequence[Sampling],
    keys: Key[Array, "B"],
    end: int = -1,
    chunk: int = CHUNK,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields what `generate` returns, `chunk` columns at a time; the device computes the next chunk
    meanwhile."""
    state = decoder.prefill(prompts, sampling, keys, new)
    yield from decode_chunks(decoder, state, max(map(len, prompts)), new, end, chunk)


def decode_chunks(
    decoder: Decoder, state: DecodeState, longest: int, new: int, end: int = -1, chunk: int = CHUNK
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields what `stream` yields, from the state after prompts of at most `longest` tokens."""
    ended = np.zeros(len(state.token), bool)
    previous = None
    for start in range(0, new + chunk, chunk):
        following = None
        if start < new:
            state, tokens, logprobs = decoder.decode(state, chunk, longest + start)
            following = tokens, logprobs.chosen
        if previous is not None:
            tokens, logprobs = (a[:, : new - start + chunk] for a in jax.device_get(previous))
            yield tokens, logprobs
            ended |= (tokens == end).any(axis=1)
            if ended.all():
                return
        previous = following


@partial(jax.jit, static_argnums=0)
def _decoding_params(spec: ModelSpec, params: dict) -> dict:
    """Returns the parameters with the layers unstacked and the kernels in the compute dtype, and
    rounded where they were trained so."""
    compute = spec.config.compute
    dtype = product_dtype(compute)
    _, params = as_read(spec.config, params, compute.dtype)

    def cast(path, p):  # routers choose in float32
        names = [entry.key for entry in path[-2:]]
        return p.astype(dtype) if names[1] == "kernel" and names[0] != "router" else p

    def cast_blocks(stack: dict) -> dict:
        return stack | {"blocks": jax.tree_util.tree_map_with_path(cast, stack["blocks"])}

    stacks = [name for name in ("encoder", "decoder") if name in params]
    params = params | {name: cast_blocks(params[name]) for name in stacks}
    return decoding.split_layers(params if stacks else cast_blocks(params), spec.model)


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    spec: ModelSpec,
    slots: int,
    params: dict,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    keys: Key[Array, "B"],
    sampling: BatchSampling,
    memory: decoding.Memory | None,
    prefix: Int[Array, "B"] | None,
) -> DecodeState:
    """Neither the padding nor a prompt's last token, the first to be decoded, enters the cache."""
    batch, width = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(width), prompts.shape)
    blocks = decoding.blocks_of(params)
    _, layers = decoding.prefill(spec.bind(params), blocks, prompts, positions, memory, prefix)
    written = jnp.where(positions < lengths[:, None] - 1, positions, UNWRITTEN)
    cache = empty_cache(spec.config, batch, slots, spec.rules, split=True)
    cache = write_recent(cache, Cache(layers, written), spec.rules)
    seen = jnp.zeros((batch, spec.model.padded_vocab_size), bool)
    seen = seen.at[jnp.arange(batch)[:, None], prompts].max(positions < lengths[:, None])
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
    return DecodeState(cache, last, lengths - 1, seen, keys, sampling, memory)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5, compiler_options=CPU_OPTIONS)
def _decode(spec: ModelSpec, count: int, span: int, vocab_limit: int, params, state, with_top):
    model = spec.bind(params)
    table, cache = model.vocabulary.table(), first_slots(state.cache, span)
    rows, blocks = jnp.arange(state.token.shape[0]), decoding.blocks_of(params)

    def step(carry: DecodeState, at):
        """`carry.cache` holds only the tokens of this chunk."""
        position = carry.position
        x, recent = decoding.extend(
            model, blocks, carry.token, position, cache, carry.cache, at, state.memory
        )
        logits = jax.sharding.reshard(decoding.next_logits(model, x, table), jax.P(None, None))
        keys = jax.vmap(jax.random.fold_in)(carry.keys, position + 1)
        token = next_token(limit_vocab(logits, vocab_limit), keys, carry.sampling, carry.seen)
        logprobs = token_logprobs(logits, token, vocab_limit, with_top)
        seen = carry.seen.at[rows, token].set(True)
        carry = DecodeState(recent, token, position + 1, seen, carry.keys, carry.sampling)
        return carry, (token, logprobs)

    recent = empty_cache(spec.config, len(rows), count, spec.rules)
    before = state._replace(cache=recent, memory=None)  # which no step changes
    after, outputs = jax.lax.scan(step, before, jnp.arange(count))
    cache = write_recent(state.cache, after.cache, spec.rules)
    after = after._replace(cache=cache, memory=state.memory)
    return after, *jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), outputs)


def token_logprobs(
    logits: Float[Array, "B V"], token: Int[Array, "B"], vocab_limit: int, with_top=True
) -> Logprobs:
    """Returns the log-probabilities of the tokens and of the NUM_TOP likeliest ids below
    `vocab_limit` (zeros unless `with_top`)."""
    total = jax.nn.logsumexp(logits, axis=-1)

    def top():
        """Takes the maximum NUM_TOP times: `lax.top_k` sorts the whole vocabulary."""
        left, ids = limit_vocab(logits, vocab_limit), []
        for _ in range(NUM_TOP):
            ids.append(jnp.argmax(left, axis=-1).astype(jnp.int32))
            left = jnp.where(jnp.arange(left.shape[-1]) == ids[-1][:, None], -jnp.inf, left)
        values = jnp.stack([_pick(logits, i) for i in ids], axis=-1) - total[:, None]
        return jnp.stack(ids, axis=-1), values

    shape = (len(token), NUM_TOP)
    zeros = jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
    return Logprobs(_pick(logits, token) - total, *jax.lax.cond(with_top, top, lambda: zeros))


def limit_vocab(logits: Float[Array, "B V"], vocab_limit: int) -> Float[Array, "B V"]:
    """Returns the logits with those of ids from `vocab_limit` on set to -inf."""
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_limit, logits, -jnp.inf)


def _pick(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]


def bucket_size(number: int, smallest: int) -> int:
    """Returns the smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... times `smallest` that is at least
    `number`: few shapes are compiled, and each pads little."""
    power = smallest * 2 ** max(math.ceil(math.log2(number / smallest)), 0)
    return power * 3 // 4 if power > 2 * smallest and number <= power * 3 // 4 else power


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple that is at least `number`."""
    return -(-number // multiple) * multiple


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """Returns the prompt's ids; for an empty prompt the end-of-text id, which starts a document."""
    ids = tokenizer.encode(prompt)
    return ids if len(ids) else np.array([tokenizer.end_of_text], np.int32)


def tokens_before(tokens: np.ndarray, end: int) -> np.ndarray:
    """Returns the tokens in front of the first `end`, all of them if there is none."""
    ends = np.flatnonzero(tokens == end)
    return tokens[: ends[0]] if len(ends) else tokens
