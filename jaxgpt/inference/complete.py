"""Text in, text out: what people and servers ask of a `Decoder`."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxgpt.config import BadInput
from jaxgpt.inference.decode import CHUNK, Decoder, check_length, keys_of, prompt_tokens, stream
from jaxgpt.inference.samplers import Sampling
from jaxgpt.tokenizer import Tokenizer

HALF = "\ufffd"  # what stands at the end while a character's last bytes are still to come


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue. `number` tells samples of the same seed apart."""

    prompt: str
    max_new_tokens: int = 200
    sampling: Sampling = Sampling()
    seed: int = 0
    number: int = 0
    stop: tuple[str, ...] = ()


class Continuation:
    """One text as it grows: never half a character, never a part of a stop string.

    `text` is what may be shown so far; `tokens` and `scores` are what was generated for it, the
    end-of-text left out; `finish` is "" while it grows, then "stop" (end-of-text, or a stop string)
    or "length".
    """

    def __init__(self, tokenizer: Tokenizer, request: Request):
        self.tokenizer, self.request = tokenizer, request
        self.tokens: list[int] = []
        self.scores: list[float] = []
        self.text, self.finish = "", ""

    def feed(self, tokens: Sequence[int], scores: Sequence[float]) -> str:
        """Takes the next tokens and their log-probabilities; returns the text that they add."""
        if self.finish:
            return ""
        before = len(self.text)
        for token, score in zip(tokens, scores, strict=True):
            if token == self.tokenizer.end_of_text:
                self.finish = "stop"
                break
            self.tokens.append(int(token))
            self.scores.append(float(score))
            if self._meets_stop():
                return self.text[before:]
            if len(self.tokens) == self.request.max_new_tokens:
                self.finish = "length"
                break
        self.text = self._shown(self._decoded())
        return self.text[before:]

    def _decoded(self) -> str:
        return self.tokenizer.decode(np.array(self.tokens, np.int32))

    def _meets_stop(self) -> bool:
        if not self.request.stop:
            return False
        whole = self._decoded()
        found = [at for stop in self.request.stop if (at := whole.find(stop)) >= 0]
        if found:
            self.text, self.finish = whole[: min(found)], "stop"
        return bool(found)

    def _shown(self, whole: str) -> str:
        if self.finish:
            return whole
        whole = whole.removesuffix(HALF)
        for held in range(max(map(len, self.request.stop), default=1) - 1, 0, -1):
            if any(
                stop.startswith(whole[-held:]) for stop in self.request.stop if held < len(stop)
            ):
                return whole[:-held]
        return whole


def complete(
    decoder: Decoder, tokenizer: Tokenizer, requests: Sequence[Request], chunk: int = CHUNK
) -> Iterator[tuple[int, str, Continuation]]:
    """Continues all requests side by side. Yields (which, the text just added, its state) as texts
    grow, and goes on until all are finished.

    Raises:
      BadInput: where a prompt does not fit the context; nothing is generated then.
    """
    texts = [Continuation(tokenizer, request) for request in requests]
    prompts = [prompt_tokens(tokenizer, request.prompt) for request in requests]
    for prompt, request in zip(prompts, requests, strict=True):
        check_length(len(prompt), request.max_new_tokens, decoder.cfg)
    keys = keys_of([(request.seed, request.number) for request in requests])
    new = max(request.max_new_tokens for request in requests)
    samplings = [request.sampling for request in requests]
    for tokens, scores in stream(decoder, prompts, new, samplings, keys, chunk=chunk):
        for i, text in enumerate(texts):
            if not text.finish:
                yield i, text.feed(tokens[i].tolist(), scores[i].tolist()), text
        if all(text.finish for text in texts):
            return


def completed(
    decoder: Decoder, tokenizer: Tokenizer, requests: Sequence[Request]
) -> list[Continuation]:
    """Returns every request's finished continuation.

    Raises:
      BadInput: see `complete`.
    """
    return [
        text
        for _, text in sorted(
            {i: text for i, _, text in complete(decoder, tokenizer, requests)}.items()
        )
    ]


def request_of(row: dict, default: Request, where: str) -> Request:
    """Returns the request that a row of JSON describes: `prompt`, and fields that replace those of
    `default`.

    Raises:
      BadInput: if a field is missing, ill-typed or out of range; the message starts with `where`.
    """
    kinds = {"prompt": str, "max_new_tokens": int, "seed": int, "stop": (str, list)}
    kinds |= {
        field.name: int if field.type is int else (int, float)
        for field in dataclasses.fields(Sampling)
    }
    if "prompt" not in row:
        raise BadInput(f"{where} has no field 'prompt'")
    given = {name: row[name] for name in kinds if name in row}
    for name, value in given.items():
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise BadInput(f"{where}: {name}={value!r} is not of the right type")
    stop = given.pop("stop", list(default.stop))
    stop = tuple([stop] if isinstance(stop, str) else stop)
    if not all(isinstance(one, str) and one for one in stop):
        raise BadInput(f"{where}: stop={list(stop)!r} must hold strings that are not empty")
    names = [name for name in given if hasattr(default.sampling, name)]
    fields = {name: type(getattr(default.sampling, name))(given.pop(name)) for name in names}
    sampling = dataclasses.replace(default.sampling, **fields)
    sampling.check(f"{where}: ")
    found = dataclasses.replace(default, **given, sampling=sampling, stop=stop)
    if found.max_new_tokens < 1:
        raise BadInput(f"{where}: max_new_tokens={found.max_new_tokens} must be at least 1")
    if not 0 <= found.seed < 2**32:
        raise BadInput(f"{where}: seed={found.seed} must be from 0 to {2**32 - 1}")
    return found
