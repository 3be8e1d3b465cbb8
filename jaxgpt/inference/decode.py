"""Prefill, then a `lax.scan` over new tokens with a KV cache.

The scan takes CHUNK steps at a time. So its one program serves any number of new tokens, and a
caller can look between two chunks: for a stop string, to print, to let another request in.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgpt.config import ModelConfig
from jaxgpt.inference.samplers import Sampling, Samplings, draw
from jaxgpt.model import ModelSpec
from jaxgpt.model.cache import UNWRITTEN, Cache, empty_cache, first_slots, write_recent
from jaxgpt.model.gpt import split_layers, windows
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer

BUCKET = 64  # slots of a cache are rounded up to a multiple, so that few shapes are compiled
PROMPT = 16  # and prompts to a few multiples of this
CHUNK = 20  # tokens of each row between two looks
BEST = 5  # alternatives to a token that may be told


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """B texts being continued: all that the next step needs.

    `token` is each row's last one, which stands at `position` and is not yet in the cache.
    """

    cache: Any
    token: Any  # int32 [B]
    position: Any  # int32 [B]
    seen: Any  # bool [B, V]: what stands in the row
    keys: Any  # [B]
    sampling: Any  # Samplings of [B]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model's parameters laid out for decoding, and the programs that use them.

    Row b's draw at position p depends on its own prompt and (keys[b], p) alone. Call its methods
    under `jax.set_mesh`.
    """

    spec: ModelSpec
    params: dict
    drawable: int

    @classmethod
    def of(cls, spec: ModelSpec, params: dict, drawable: int) -> "Decoder":
        """Returns the decoder of a model; `params` are those of training. Only the first `drawable`
        ids, the tokenizer's, are ever drawn: the model's vocabulary may be larger."""
        return cls(spec.for_decoding(), _laid_out(spec.for_decoding(), params), drawable)

    @property
    def cfg(self) -> ModelConfig:
        """The model's sizes."""
        return self.spec.cfg

    def start(
        self,
        prompts: Sequence[np.ndarray],
        sampling: Sequence[Sampling],
        keys: Key[Array, "B"],
        new: int,
        slots: int = 0,
    ) -> Rows:
        """Reads the prompts into a cache with room for `new` tokens more, or of `slots` in all.
        What grows beyond the context (see `check_length`) is of no use, and harms no other row."""
        lengths = np.array([len(p) for p in prompts], np.int32)
        width = bucket(int(lengths.max()), PROMPT)
        room = width + _up(new, CHUNK)
        if slides(self.cfg):
            room = min(room, max(width, _up(self.cfg.window, BUCKET)))
        room = slots or room
        padded = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        return _prefill(
            self.spec, _up(room, BUCKET), self.params, padded, lengths, keys, Samplings.of(sampling)
        )

    def more(
        self, rows: Rows, count: int = CHUNK, reach: int = 0, best: bool = False
    ) -> tuple[Rows, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
        """Returns the rows grown by `count` tokens, those tokens, and the log-probability that the
        model (no filter, temperature 1) gave each: [B, count]. It takes `rows` away.

        `reach` > 0 says that no row has more tokens yet, so that no more of the cache is read. Last
        come the BEST likeliest ids in each token's place, and their log-probabilities: zeros unless
        `best`, which changes no program.
        """
        slots = rows.cache.positions.shape[1]
        span = slots if reach <= 0 else min(slots, bucket(reach, BUCKET))
        return _more(self.spec, count, span, self.drawable, self.params, rows, best)


def slides(cfg: ModelConfig) -> bool:
    """Says whether texts may grow past `max_seq_len`: positions are relative (RoPE, or none) and
    every layer forgets what leaves its window."""
    return cfg.position in ("rope", "none") and all(windows(cfg))


def check_length(prompt_length: int, new: int, cfg: ModelConfig) -> None:
    """Raises `BadInput` where prompt and continuation do not fit the context, nor slide in it."""
    room = cfg.max_seq_len
    if slides(cfg):
        return
    if prompt_length > room:
        raise BadInput(
            f"the prompt has {prompt_length} tokens, more than the model's context of"
            f" {room} (model.max_seq_len); shorten it"
        )
    if prompt_length + new > room:
        raise BadInput(
            f"a prompt of {prompt_length} tokens and --max_new_tokens={new} exceed the"
            f" model's context of {room} (model.max_seq_len); ask for at most"
            f" {room - prompt_length} new tokens"
        )


def keys_of(seeds: Sequence[tuple[int, int]]) -> Key[Array, "B"]:
    """Returns the key of each (seed, number of the sample)."""
    return _keys_of(*np.array(seeds, np.uint32).T)


@jax.jit  # once: compiled anew for each request it took longer than the prompt
@jax.vmap
def _keys_of(seed, number):
    return jax.random.fold_in(jax.random.key(seed), number)


def generate(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    new: int,
    sampling: Sampling,
    seed: int = 0,
    end: int = -1,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `new` tokens of each prompt and their log-probabilities, [B, new]; sample b uses key
    (seed, b). It ends early, with fewer, once the token `end` stands in every row.

    Raises:
      BadInput: where a prompt and its continuation exceed the context.
    """
    check_length(max(map(len, prompts)), new, decoder.cfg)
    keys = keys_of([(seed, b) for b in range(len(prompts))])
    chunks = list(stream(decoder, prompts, new, [sampling] * len(prompts), keys, end))
    tokens, scores = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
    return tokens, scores


def stream(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    new: int,
    sampling: Sequence[Sampling],
    keys: Key[Array, "B"],
    end: int = -1,
    chunk: int = CHUNK,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields what `generate` returns, some columns at a time; the next are under way meanwhile."""
    rows, longest = decoder.start(prompts, sampling, keys, new), max(map(len, prompts))
    ended = np.zeros(len(prompts), bool)
    coming = None
    for made in range(0, new + chunk, chunk):
        following = None
        if made < new:
            rows, following = decoder.more(rows, chunk, longest + made)
        if coming is not None:
            tokens, scores = jax.device_get(coming[:2])
            left = new - (made - chunk)
            yield tokens[:, :left], scores[:, :left]
            ended |= (tokens == end).any(axis=1)
            if ended.all():
                return
        coming = following


@partial(jax.jit, static_argnums=0)
def _laid_out(spec: ModelSpec, params: dict) -> dict:
    """Returns each layer's parameters apart, its kernels in the dtype that they are used in."""
    dtype = jnp.dtype(spec.cfg.dtype)

    def cast(path, p):
        return p.astype(dtype) if path[-1].key == "kernel" else p

    return split_layers(
        params | {"blocks": jax.tree_util.tree_map_with_path(cast, params["blocks"])}
    )


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    spec: ModelSpec,
    room: int,
    params: dict,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    keys: Key[Array, "B"],
    sampling: Samplings,
) -> Rows:
    """Padding is not put into the cache, nor is the last token, with which decoding begins."""
    batch, width = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(width), prompts.shape)
    _, layers = spec.bind(params).prefill(params["blocks"], prompts, positions)
    known = jnp.where(positions < lengths[:, None] - 1, positions, UNWRITTEN)
    cache = write_recent(
        empty_cache(spec.cfg, batch, room, spec.rules), Cache(layers, known), spec.rules
    )
    seen = jnp.zeros((batch, spec.cfg.padded_vocab_size), bool)
    seen = seen.at[jnp.arange(batch)[:, None], prompts].max(positions < lengths[:, None])
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
    return Rows(cache, last, lengths - 1, seen, keys, sampling)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _more(spec: ModelSpec, count: int, span: int, drawable: int, params: dict, rows: Rows, best):
    model = spec.bind(params)
    table, batch = model.table(), rows.token.shape[0]
    read, fresh = first_slots(rows.cache, span), empty_cache(spec.cfg, batch, count, spec.rules)

    def step(carry, at):
        recent, token, position, seen = carry
        x, recent = model.extend(params["blocks"], token, position, read, recent, at)
        logits = jax.sharding.reshard(model.next_logits(x, table), jax.P(None, None))
        keys = jax.vmap(jax.random.fold_in)(rows.keys, position + 1)
        token = draw(only(logits, drawable), keys, rows.sampling, seen)
        told = jax.lax.cond(best, partial(best_of, drawable=drawable), _score_of, logits, token)
        seen = seen.at[jnp.arange(batch), token].set(True)
        return (recent, token, position + 1, seen), (token, *told)

    carry = (fresh, rows.token, rows.position, rows.seen)
    (recent, token, position, seen), told = jax.lax.scan(step, carry, jnp.arange(count))
    cache = write_recent(rows.cache, recent, spec.rules)
    grown = Rows(cache, token, position, seen, rows.keys, rows.sampling)
    return grown, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), told)


def best_of(
    logits: Float[Array, "B V"], token: Int[Array, "B"], drawable: int
) -> tuple[Float[Array, "B"], Int[Array, "B K"], Float[Array, "B K"]]:
    """Returns each token's log-probability, the BEST likeliest ids and their log-probabilities. So
    many passes over the logits: `lax.top_k` sorts them."""
    total = jax.nn.logsumexp(logits, axis=-1)
    left, ids = only(logits, drawable), []
    for _ in range(BEST):
        ids.append(jnp.argmax(left, axis=-1).astype(jnp.int32))
        left = jnp.where(jnp.arange(left.shape[-1]) == ids[-1][:, None], -jnp.inf, left)
    best = jnp.stack([_at(logits, i) for i in ids], axis=-1) - total[:, None]
    return _at(logits, token) - total, jnp.stack(ids, axis=-1), best


def _score_of(logits, token):
    """Returns what `best_of` does, without looking for the likeliest."""
    none = jnp.zeros((len(token), BEST))
    score = _at(logits, token) - jax.nn.logsumexp(logits, axis=-1)
    return score, none.astype(jnp.int32), none


def only(logits: Float[Array, "B V"], drawable: int) -> Float[Array, "B V"]:
    """Returns logits that are -inf but for the first `drawable` ids."""
    return jnp.where(jnp.arange(logits.shape[-1]) < drawable, logits, -jnp.inf)


def _at(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]


def bucket(number: int, least: int) -> int:
    """Returns the smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... times `least` that is at least
    `number`: few programs, each with little too much to do."""
    power = least * 2 ** max(math.ceil(math.log2(number / least)), 0)
    return power * 3 // 4 if power > 2 * least and number <= power * 3 // 4 else power


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """Returns the prompt's ids; an empty prompt is an end-of-text, which starts a document."""
    ids = tokenizer.encode(prompt)
    return ids if len(ids) else np.array([tokenizer.end_of_text], np.int32)


def until(tokens: np.ndarray, end: int) -> np.ndarray:
    """Returns the tokens in front of the first `end`, all where there is none."""
    found = np.flatnonzero(tokens == end)
    return tokens[: found[0]] if len(found) else tokens
