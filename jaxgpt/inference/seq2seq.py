"""Decoding of an encoder-decoder: the encoder reads the sources once, then the decoder writes the
targets token by token, greedily, sampled or by beam search, many at once.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jaxgpt.config import ModelConfig
from jaxgpt.inference.beam import Hypothesis, search_texts
from jaxgpt.inference.decode import (
    CHUNK,
    Decoder,
    DecodeState,
    decode_chunks,
    pad_rows,
    sample_keys,
    tokens_before,
)
from jaxgpt.inference.generation import Continuation, feed_chunks
from jaxgpt.inference.requests import BeamSettings, GenerationRequest, Sampling
from jaxgpt.model import ModelSpec, decoding
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.base import encode_around
from jaxgpt.tokenizer.roles import SENTINEL, framed, sentinels

BATCH = 32  # sources that are decoded at once
GREEDY = Sampling(0.0)


@dataclasses.dataclass(frozen=True)
class Seq2SeqDecoder:
    """An encoder-decoder laid out for decoding. A target begins behind the tokens `start`, which
    are not part of it, and ends in front of `end`. Call the methods under `jax.set_mesh`."""

    decoder: Decoder
    start: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, spec: ModelSpec, params: dict, tokenizer: Tokenizer) -> "Seq2SeqDecoder":
        """Returns the decoder of a model with its training `params`, for the tokenizer that it was
        trained with: that says how a target starts (T5: `<pad>`; BART: `</s>` and, where its
        folder forces it, `<s>`) and ends."""
        start = (tokenizer.role("decoder_start"), tokenizer.role("forced_bos"))
        end = framed(tokenizer, [])[0][-1]
        decoder = Decoder.of(spec, params, tokenizer.vocab_size)
        return cls(decoder, tuple(token for token in start if token is not None), end)

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.decoder.spec.model

    @property
    def room(self) -> int:
        """The most tokens of a target."""
        return self.config.max_seq_len - len(self.start) + 1

    def check(self, source: np.ndarray) -> None:
        """Raises `BadInput` if the source is longer than the encoder reads."""
        if len(source) > self.config.max_source_len:
            raise BadInput(
                f"the prompt has {len(source)} tokens, more than the encoder reads"
                f" (model.max_source_len={self.config.max_source_len}); shorten it"
            )

    def prefill(
        self,
        sources: Sequence[np.ndarray],
        sampling: Sequence[Sampling],
        keys: Key[Array, "B"],
        new: int,
        copies: int = 1,
    ) -> DecodeState:
        """Returns the state in front of the first token of each source's target, `copies` rows for
        each source; see `Decoder.prefill`."""
        spec, params = self.decoder.spec, self.decoder.params
        segments = pad_rows([np.ones_like(source) for source in sources])
        memory = _read(spec, copies, params, pad_rows(sources), segments)
        starts = [np.array(self.start, np.int32)] * (len(sources) * copies)
        return self.decoder.prefill(starts, sampling, keys, new, memory=memory)

    def stream(
        self,
        sources: Sequence[np.ndarray],
        new: int,
        sampling: Sequence[Sampling],
        keys: Key[Array, "B"],
        chunk: int = CHUNK,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the targets' tokens and their log-probabilities, `chunk` columns at a time, until
        all have ended; see `inference.decode.stream`."""
        state = self.prefill(sources, sampling, keys, new)
        yield from decode_chunks(self.decoder, state, len(self.start), new, self.end, chunk)

    def search(
        self, sources: Sequence[np.ndarray], new: int, settings: BeamSettings
    ) -> list[list[Hypothesis]]:
        """Returns the best targets of each source, one for each beam, the best first. Of the tokens
        in front of a target, all but the first count for its length, as in transformers."""
        rows = len(sources) * settings.num_beams
        keys = sample_keys([(0, 0)] * rows)
        state = self.prefill(sources, [GREEDY] * rows, keys, new, settings.num_beams)
        counted = len(self.start) - 1
        return search_texts(self.decoder, state, new, settings, self.end, counted)


@partial(jax.jit, static_argnums=(0, 1))
def _read(
    spec: ModelSpec,
    copies: int,
    params: dict,
    sources: Int[Array, "B S"],
    segments: Int[Array, "B S"],
) -> decoding.Memory:
    model = spec.bind(params)
    memory = decoding.read_sources(model, decoding.blocks_of(params), sources, segments)

    def repeat(a):
        rows = jnp.arange(a.shape[0] * copies) // copies
        return a.at[rows].get(out_sharding=jax.typeof(a).sharding.spec)

    return jax.tree.map(repeat, memory)


def encode_source(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Returns the tokens of a source in the frame of special tokens that its model expects; the
    names of T5's sentinels in it are those tokens."""
    names = {SENTINEL.format(i): token for i, token in enumerate(sentinels(tokenizer))}
    return np.array(framed(tokenizer, encode_around(text, names, tokenizer.encode))[0], np.int32)


def framing_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the special tokens that are not part of a text: padding, starts and ends."""
    roles = ("pad", "bos", "cls", "eos", "sep", "decoder_start", "forced_bos")
    return frozenset(i for i in map(tokenizer.role, roles) if i is not None)


def target_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Returns the text of a target, without the tokens that only frame a text."""
    silent = framing_tokens(tokenizer)
    return tokenizer.decode([token for token in tokens if token not in silent])


def encode_requests(
    decoder: Seq2SeqDecoder, tokenizer: Tokenizer, requests: Sequence[GenerationRequest]
) -> list[np.ndarray]:
    """Returns the tokens of each request's prompt. Raises `BadInput` if one is longer than the
    encoder reads."""
    sources = [encode_source(tokenizer, request.prompt) for request in requests]
    for source in sources:
        decoder.check(source)
    return sources


def stream_targets(
    decoder: Seq2SeqDecoder,
    tokenizer: Tokenizer,
    requests: Sequence[GenerationRequest],
    chunk: int = CHUNK,
) -> Iterator[tuple[int, str, Continuation]]:
    """Yields what `inference.generation.stream_text` yields, for the targets of the requests'
    prompts. A target ends at the latest where the decoder's context does."""
    sources = encode_requests(decoder, tokenizer, requests)
    requests = [_target_request(decoder, request) for request in requests]
    silent = framing_tokens(tokenizer)
    texts = [Continuation(tokenizer, request, (), decoder.end, silent) for request in requests]
    keys = sample_keys([(request.seed, request.sample_index) for request in requests])
    new = max(request.max_new_tokens for request in requests)
    samplings = [request.sampling for request in requests]
    yield from feed_chunks(texts, decoder.stream(sources, new, samplings, keys, chunk))


def search_targets(
    decoder: Seq2SeqDecoder, tokenizer: Tokenizer, request: GenerationRequest, beams: BeamSettings
) -> list[str]:
    """Returns the targets that a beam search finds for a request's prompt, best first."""
    sources = encode_requests(decoder, tokenizer, [request])
    request, silent, texts = _target_request(decoder, request), framing_tokens(tokenizer), []
    for tokens, score in decoder.search(sources, request.max_new_tokens, beams)[0]:
        text = Continuation(tokenizer, request, (), decoder.end, silent)
        text.feed([*tokens.tolist(), decoder.end], [score] * (len(tokens) + 1))
        texts.append(text.text)
    return texts


def _target_request(decoder: Seq2SeqDecoder, request: GenerationRequest) -> GenerationRequest:
    new = min(request.max_new_tokens, decoder.room)
    return dataclasses.replace(request, prompt="", max_new_tokens=new)


def decode_batch(
    decoder: Seq2SeqDecoder,
    tokenizer: Tokenizer,
    sources: Sequence[Sequence[int] | np.ndarray],
    new: int = 0,
    beams: BeamSettings | None = None,
    batch: int = BATCH,
) -> list[str]:
    """Returns the target of each source of tokens (see `encode_source`), greedy or the best of a
    search by `beams`, of at most `new` tokens (0: as many as the decoder's context holds). Sources
    of about the same length are decoded together, `batch` at a time. Call it under `jax.set_mesh`.

    Raises `BadInput` if a source is longer than the encoder reads.
    """
    rows = [np.asarray(source, np.int32) for source in sources]
    new = min(new, decoder.room) if new else decoder.room
    for row in rows:
        decoder.check(row)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    texts = [""] * len(rows)
    batch = min(batch, len(rows))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        filled = chosen + chosen[-1:] * (batch - len(chosen))  # one batch size is compiled
        targets = _targets(decoder, [rows[i] for i in filled], new, beams)
        for i, tokens in zip(chosen, targets):
            texts[i] = target_text(tokenizer, tokens.tolist())
    return texts


def _targets(
    decoder: Seq2SeqDecoder, sources: list[np.ndarray], new: int, beams: BeamSettings | None
) -> list[np.ndarray]:
    if beams is not None:
        return [found[0][0] for found in decoder.search(sources, new, beams)]
    keys = sample_keys([(0, 0)] * len(sources))
    chunks = decoder.stream(sources, new, [GREEDY] * len(sources), keys)
    tokens = np.concatenate([tokens for tokens, _ in chunks], axis=1)
    return [tokens_before(row, decoder.end) for row in tokens]
