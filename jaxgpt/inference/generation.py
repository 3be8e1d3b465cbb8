"""Text generation: requests with prompts in, text that grows out."""

import bisect
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.inference.decode import CHUNK, Decoder, check_length, encode_prompt, sample_keys, stream
from jaxgpt.inference.requests import GenerationRequest
from jaxgpt.inference.sliding import slide
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import IncrementalDetokenizer, Tokenizer
from jaxgpt.tokenizer.base import ROLES

Top = Sequence[tuple[int, float]]  # (id, log-probability), the likeliest first


class TokenLogprob(NamedTuple):
    """A token's log-probability (None for a prompt's first token: nothing precedes it), the
    likeliest (id, log-probability) in its place, and the character of prompt and text at which it
    starts."""

    token: int
    logprob: float | None
    top: Top
    offset: int


class Continuation:
    """The text generated for one request: only whole characters, and no part of a stop string.

    `text` may be shown; `pending` is held back, as it could be the start of a stop string.
    `tokens` and `logprobs` are those generated, without the end-of-text. `finish_reason` is ""
    while the text grows, then "stop" (end-of-text or a stop string), "length" or "broken" (a
    log-probability is not finite). `details` has an entry for each token and for the end-of-text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: GenerationRequest,
        prompt: Iterable = (),
        end: int | None = None,
        silent: Collection[int] = (),
    ):
        """`prompt` holds the ids of `request.prompt`, which the text continues. It ends at the
        token `end`, by default the end-of-text; `silent` tokens have no text."""
        self.tokenizer, self.request, self.silent = tokenizer, request, silent
        self.end = tokenizer.end_of_text if end is None else end
        self.detokenizer = IncrementalDetokenizer(tokenizer, prompt, request.prompt)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.details: list[TokenLogprob] = []
        self.text = self.pending = self.finish_reason = ""

    def feed(self, tokens: list[int], logprobs: list[float], tops: Iterable[Top] = ()) -> str:
        """Takes the next tokens, their log-probabilities and the likeliest (id, log-probability) in
        the place of each; returns the text that they add."""
        before = len(self.text)
        for token, logprob, top in itertools.zip_longest(tokens, logprobs, tops, fillvalue=()):
            if self.finish_reason:
                break
            if not math.isfinite(logprob):
                self._finish("broken")
                break
            offset = self._shown_end + len(self.pending)
            self.details.append(TokenLogprob(token, logprob, top, offset))
            if token == self.end:
                self._finish("stop")
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self._add("" if token in self.silent else self.detokenizer.add(token))
            if not self.finish_reason and len(self.tokens) == self.request.max_new_tokens:
                self._finish("length")
        return self.text[before:]

    @property
    def num_shown(self) -> int:
        """How many of `details` belong to the text shown so far."""
        ended = self.details and self.details[-1].token == self.end
        if self.finish_reason == "length" or ended:
            return len(self.details)
        return bisect.bisect_left(self.details, self._shown_end, key=lambda detail: detail.offset)

    @property
    def _shown_end(self) -> int:
        return len(self.request.prompt) + len(self.text)

    def _add(self, new: str) -> None:
        """Shows text up to the first complete stop string, and without an end that could become
        one."""
        text, stops = self.pending + new, self.request.stop
        starts = [(text.find(stop), stop) for stop in stops]
        if complete := [(start + len(stop), start) for start, stop in starts if start >= 0]:
            shown, self.finish_reason = min(complete)[1], "stop"
            text = text[:shown]
        else:
            ends = (i for i in range(len(text)) if any(s.startswith(text[i:]) for s in stops))
            shown = next(ends, len(text))
        self.text, self.pending = self.text + text[:shown], text[shown:]

    def _finish(self, reason: str) -> None:
        self._add(self.detokenizer.flush())
        if not self.finish_reason:
            self.text, self.pending, self.finish_reason = self.text + self.pending, "", reason


def encode_request(tokenizer: Tokenizer, request: GenerationRequest) -> np.ndarray:
    """Returns the ids of a request's prompt. A chat's are those of training: each span by itself,
    behind an end-of-text. Raises `BadInput` if the tokenizer lacks a special token."""
    if request.suffix:
        return with_suffix(tokenizer, tokenizer.encode(request.prompt), request.suffix)
    if not request.spans:
        return encode_prompt(tokenizer, request.prompt)
    special = tokenizer.special
    for text in (span.text for span in request.spans if span.special):
        if text not in special:
            raise BadInput(f"the tokenizer has no special token {text}, which the template needs")
    ids = [[special[s.text]] if s.special else tokenizer.encode(s.text) for s in request.spans]
    return np.concatenate([[tokenizer.end_of_text], *ids]).astype(np.int32)


def with_suffix(tokenizer: Tokenizer, prompt: np.ndarray, suffix: str) -> np.ndarray:
    """Returns the ids of a prompt that asks for the text between `prompt` and `suffix`, as a model
    trained to fill in the middle reads them (arXiv:2207.14255, PSM): end-of-text, prefix mark,
    prompt, suffix mark, suffix, middle mark. Raises `BadInput` if the tokenizer lacks the marks."""
    roles = ("fim_prefix", "fim_suffix", "fim_middle")
    if lacking := [ROLES[role][0] for role in roles if tokenizer.role(role) is None]:
        names = ",".join(ROLES[role][0] for role in roles)
        raise BadInput(
            f"a suffix needs the special token {lacking[0]}, which the tokenizer lacks: train with"
            f" --config.objective=fill_in_the_middle --config.data.special_tokens='{names}'"
        )
    before, behind, middle = ([tokenizer.role(role)] for role in roles)
    parts = [tokenizer.end_of_text], before, prompt, behind, tokenizer.encode(suffix), middle
    return np.concatenate(parts).astype(np.int32)


def encode_prompts(
    decoder: Decoder, tokenizer: Tokenizer, requests: Sequence[GenerationRequest]
) -> list[np.ndarray]:
    """Returns the ids of each request's prompt; `check_length` refuses what does not fit, unless
    the decoder slides."""
    prompts = [encode_request(tokenizer, request) for request in requests]
    for prompt, request in zip(prompts, requests, strict=True):
        if not decoder.slides:
            remedy = ", or use --beyond_context=slide"
            check_length(len(prompt), request.max_new_tokens, decoder.spec.model, remedy)
    return prompts


def stream_text(
    decoder: Decoder,
    tokenizer: Tokenizer,
    requests: Sequence[GenerationRequest],
    chunk: int = CHUNK,
) -> Iterator[tuple[int, str, Continuation]]:
    """Continues all requests in one batch. Yields (index of the request, the text just added, its
    continuation) until all are finished. Raises `BadInput`: before anything is generated, if a
    request does not fit the context."""
    prompts = encode_prompts(decoder, tokenizer, requests)
    texts = [Continuation(tokenizer, *pair) for pair in zip(requests, prompts, strict=True)]
    keys = sample_keys([(request.seed, request.sample_index) for request in requests])
    new = max(request.max_new_tokens for request in requests)
    samplings = [request.sampling for request in requests]
    generate = slide if decoder.slides else stream
    yield from feed_chunks(texts, generate(decoder, prompts, new, samplings, keys, chunk=chunk))


def feed_chunks(
    texts: Sequence[Continuation], chunks: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[int, str, Continuation]]:
    """Yields what `stream_text` does, from the tokens and log-probabilities [B, C] of all texts,
    some columns at a time."""
    for tokens, logprobs in chunks:
        for i, text in enumerate(texts):
            if not text.finish_reason:
                yield i, text.feed(tokens[i].tolist(), logprobs[i].tolist()), text
        if all(text.finish_reason for text in texts):
            return


def generate_text(
    decoder: Decoder, tokenizer: Tokenizer, requests: Sequence[GenerationRequest]
) -> list[Continuation]:
    """Returns every request's finished continuation; see `stream_text`."""
    return last_of(stream_text(decoder, tokenizer, requests))


def last_of(pieces: Iterable[tuple[int, str, Continuation]]) -> list[Continuation]:
    """Returns the continuations, finished, of what `stream_text` yields."""
    texts = {i: text for i, _, text in pieces}
    return [texts[i] for i in sorted(texts)]
