"""Text in, text out: what people and servers ask of a `Decoder`."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from jaxgpt.inference.decode import CHUNK, Decoder, check_length, keys_of, prompt_tokens, stream
from jaxgpt.inference.samplers import Sampling
from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import IncrementalDetokenizer, Tokenizer

LONGEST_STOP = 1000  # characters
MOST = 2**32 - 1  # of a seed, as of a count


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
    end-of-text left out; `finish` is "" while it grows, then "stop" (end-of-text, or a stop
    string), "length", or "broken" (the model's numbers are not finite).

    `told` has a row for each token, and for an end-of-text: its id, score, the likeliest ids in its
    place with theirs, and where in the text it starts.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request, prompt: Iterable = ()):
        """`prompt` are the ids of `request.prompt`: the text goes on from there."""
        self.tokenizer, self.request = tokenizer, request
        self.detokenizer = IncrementalDetokenizer(tokenizer, prompt, request.prompt)
        self.stops = [StopString(stop) for stop in request.stop]
        self.tokens: list[int] = []
        self.scores: list[float] = []
        self.told: list[tuple[int, float, Sequence, int]] = []
        self.text, self.finish = "", ""
        self.held = ""  # certain, but perhaps the start of a stop string

    def feed(
        self, tokens: Sequence[int], scores: Sequence[float], best: Sequence[Sequence] = ()
    ) -> str:
        """Takes the next tokens and their log-probabilities (and of each the likeliest ids in its
        place, with theirs); returns the text that they add."""
        before = len(self.text)
        for token, score, others in itertools.zip_longest(tokens, scores, best, fillvalue=()):
            if self.finish:
                break
            if not math.isfinite(score):
                self._end("broken")
                break
            self.told.append((int(token), float(score), others, len(self.text) + len(self.held)))
            if token == self.tokenizer.end_of_text:
                self._end("stop")
                break
            self.tokens.append(int(token))
            self.scores.append(float(score))
            self._show(self.detokenizer.add(token))
            if not self.finish and len(self.tokens) == self.request.max_new_tokens:
                self._end("length")
        return self.text[before:]

    @property
    def num_told(self) -> int:
        """How many rows of `told` belong to the text shown so far."""
        ended = self.told and self.told[-1][0] == self.tokenizer.end_of_text
        if self.finish == "length" or ended:
            return len(self.told)
        return bisect.bisect_left(self.told, len(self.text), key=lambda row: row[-1])

    def _show(self, new: str) -> None:
        """Adds `new` to the text, up to the stop string that is complete first."""
        for at, character in enumerate(new, start=1):
            found = [len(stop.text) for stop in self.stops if stop.ends_with(character)]
            if found:
                whole = self.held + new[:at]
                self.text += whole[: len(whole) - max(found)]
                self.finish, self.held = "stop", ""
                return
        whole = self.held + new
        kept = len(whole) - max((stop.matched for stop in self.stops), default=0)
        self.text, self.held = self.text + whole[:kept], whole[kept:]

    def _end(self, finish: str) -> None:
        self._show(self.detokenizer.flush())
        if not self.finish:
            self.text, self.held, self.finish = self.text + self.held, "", finish


class StopString:
    """Looks for `text` in characters that come one by one, in a time that does not depend on its
    length (Knuth, Morris and Pratt 1977). `matched` of its characters are what came last."""

    def __init__(self, text: str):
        self.text, self.matched = text, 0
        self.shorter = [0]  # for each start of `text`, the longest start that is its end as well
        for character in text[1:]:
            self.shorter.append(self._next(character, self.shorter[-1]))

    def ends_with(self, character: str) -> bool:
        """Takes a character; says whether it completes the stop string."""
        self.matched = self._next(character, self.matched)
        return self.matched == len(self.text)

    def _next(self, character: str, matched: int) -> int:
        while matched and self.text[matched] != character:
            matched = self.shorter[matched - 1]
        return matched + (self.text[matched] == character)


def complete(
    decoder: Decoder, tokenizer: Tokenizer, requests: Sequence[Request], chunk: int = CHUNK
) -> Iterator[tuple[int, str, Continuation]]:
    """Continues all requests side by side. Yields (which, the text just added, its state) as texts
    grow, and goes on until all are finished.

    Raises:
      BadInput: where a prompt does not fit the context; nothing is generated then.
    """
    prompts = [prompt_tokens(tokenizer, request.prompt) for request in requests]
    texts = [Continuation(tokenizer, *pair) for pair in zip(requests, prompts, strict=True)]
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


def request_of(row: dict, default: Request, where: str, least: int = 1) -> Request:
    """Returns the request that a row of JSON describes: `prompt`, and fields that replace those of
    `default`. It may ask for no fewer than `least` tokens.

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
            raise BadInput(f"{where}: {name}={shown(value)} is not of the right type")
    check_text(given["prompt"], f"{where}: prompt")
    stop = given.pop("stop", list(default.stop))
    stop = tuple([stop] if isinstance(stop, str) else stop)
    check_stops(stop, f"{where}: stop")
    names = [name for name in given if hasattr(default.sampling, name)]
    fields = {name: _floated(given.pop(name), kinds[name]) for name in names}
    sampling = dataclasses.replace(default.sampling, **fields)
    sampling.check(f"{where}: ")
    found = dataclasses.replace(default, **given, sampling=sampling, stop=stop)
    check_range(f"{where}: max_new_tokens", found.max_new_tokens, least, MOST)
    check_range(f"{where}: seed", found.seed, 0, MOST)
    return found


def check_stops(stops: Sequence[object], name: str) -> None:
    """Raises `BadInput`, naming the field, for stop strings that cannot be."""
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise BadInput(f"{name}={shown(list(stops))} must hold strings that are not empty")
        if len(stop) > LONGEST_STOP:
            raise BadInput(
                f"{name} holds a string of {len(stop)} characters; at most {LONGEST_STOP}"
            )
        check_text(stop, name)


def check_range(name: str, value: int, least: int, most: int) -> None:
    """Raises `BadInput`, naming the field, for a number that is not from `least` to `most`."""
    if value < least:
        raise BadInput(f"{name}={shown(value)} must be at least {least}")
    if value > most:
        raise BadInput(f"{name}={shown(value)} must be from {least} to {most}")


def _floated(value: int | float, kind: object) -> int | float:
    """Returns a number for a field of this kind; one of 400 digits is infinite as a float."""
    if kind is int or isinstance(value, float):
        return value
    return float(value) if abs(value) < 2**63 else math.inf * (1 if value > 0 else -1)


def shown(value: object) -> str:
    """Returns a value of any length as a message quotes it."""
    try:
        text = repr(value)
    except RecursionError:  # JSON may nest as deep as Python allows
        return f"{type(value).__name__} (nested too deep)"
    return text if len(text) < 100 else f"{text[:50]}... ({len(text)} characters)"
