"""OpenAI's completions, in and out: what a body may ask for, and the shape of an answer."""

import dataclasses
import math
import secrets
from collections.abc import Sequence

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.inference.complete import Continuation, Request, request_of, shown
from jaxgpt.inference.decode import BEST, check_length, prompt_tokens
from jaxgpt.inference.samplers import Sampling
from jaxgpt.inference.score import Scores
from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import IncrementalDetokenizer, Tokenizer, decode_prompt

END_OF_TEXT = "<|endoftext|>"
LEAST = -9999.0  # what OpenAI gives for the logarithm of 0

MAX_CHOICES = 16  # prompts times n
MAX_STOPS = 4
NOTHING = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "suffix": ""}
KNOWN = {
    "model",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stream",
    "stream_options",
    "logprobs",
    "echo",
    "stop",
    "seed",
    "best_of",
    "user",
    "top_k",
    "min_p",
    "repetition_penalty",
    *NOTHING,
}


class Refused(Exception):
    """A request that cannot be answered: HTTP status, message, and OpenAI's `code` and `param`."""

    def __init__(self, status: int, message: str, code: str = "", param: str = ""):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict:
        """Returns OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param or None,
                "code": self.code or None,
            }
        }


@dataclasses.dataclass(frozen=True)
class Asked:
    """A body understood: the choices to make, in order, and how to answer."""

    prompts: list[np.ndarray]
    requests: list[Request]
    stream: bool
    logprobs: int  # alternatives to each token; -1: no log-probabilities at all
    echo: bool
    include_usage: bool


def understood(body: object, model: str, tokenizer: Tokenizer, cfg: ModelConfig) -> Asked:
    """Returns what a completions body asks for.

    Raises:
      Refused: 400 or 404, naming the field.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    if unknown := sorted(set(body) - KNOWN):
        raise Refused(400, f"unknown field {shown(unknown[0])}", param=unknown[0])
    body = {name: value for name, value in body.items() if value is not None}
    if body.get("model", model) != model:
        raise Refused(
            404, f"there is no model {shown(body['model'])}, only {model!r}", "model_not_found"
        )
    for name, nothing in NOTHING.items():
        if body.get(name, nothing) != nothing:
            raise Refused(400, f"{name} is not supported", param=name)
    n = _number(body, "n", 1, 1, MAX_CHOICES)
    if _number(body, "best_of", n, 1, MAX_CHOICES) != n:
        raise Refused(400, "best_of is not supported but for the value of n", param="best_of")
    prompts = _prompts(body.get("prompt", ""), tokenizer, cfg)
    if len(prompts) * n > MAX_CHOICES:
        raise Refused(
            400, f"{len(prompts)} prompts times n={n} are more than {MAX_CHOICES} choices"
        )
    logprobs = _number(body, "logprobs", 0, 0, BEST) if "logprobs" in body else -1
    flags = {name: _flag(body, name) for name in ("stream", "echo")}
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object", param="stream_options")
    usage = _flag(options, "include_usage")
    requests = [
        dataclasses.replace(_request(body, text), number=i) for text, _ in prompts for i in range(n)
    ]
    ids = [tokens for _, tokens in prompts for _ in range(n)]
    for tokens, request in zip(ids, requests, strict=True):
        try:
            check_length(len(tokens), request.max_new_tokens, cfg)
        except BadInput as e:
            message = str(e).replace("--max_new_tokens", "max_tokens")
            raise Refused(400, message, "context_length_exceeded") from e
        if len(tokens) + request.max_new_tokens > cfg.max_seq_len:  # of a model that slides
            room = cfg.max_seq_len - len(tokens)
            message = f"a slot holds {cfg.max_seq_len} tokens: ask for at most {room} new tokens"
            raise Refused(400, message, "context_length_exceeded")
    return Asked(ids, requests, flags["stream"], logprobs, flags["echo"], usage)


def _request(body: dict, prompt: str) -> Request:
    names = {"max_tokens": "max_new_tokens"}
    row = {
        names.get(k, k): v
        for k, v in body.items()
        if k
        in (
            "max_tokens",
            "temperature",
            "top_p",
            "stop",
            "seed",
            "top_k",
            "min_p",
            "repetition_penalty",
        )
    }
    row.setdefault("seed", secrets.randbits(32))
    if isinstance(row.get("stop"), list) and len(row["stop"]) > MAX_STOPS:
        raise Refused(400, f"stop has more than {MAX_STOPS} strings", param="stop")
    default = Request("", 16, Sampling(1.0, 0))
    try:
        return request_of(row | {"prompt": prompt}, default, "body", least=0)
    except BadInput as e:
        message = str(e).removeprefix("body: ").replace("max_new_tokens", "max_tokens")
        raise Refused(400, message, param=message.partition("=")[0]) from e


def _prompts(given: object, tokenizer: Tokenizer, cfg: ModelConfig) -> list[tuple[str, np.ndarray]]:
    """Returns text and tokens of each prompt: a string, tokens, or a list of either."""
    if isinstance(given, str) or (isinstance(given, list) and given and type(given[0]) is int):
        given = [given]
    if not isinstance(given, list) or not given or len(given) > MAX_CHOICES:
        raise Refused(
            400,
            f"prompt must be text, tokens, or a list of 1 to {MAX_CHOICES} of either",
            param="prompt",
        )
    found = []
    for one in given:
        if isinstance(one, str):
            try:
                check_text(one, "a prompt")
            except BadInput as e:
                raise Refused(400, f"not valid text: {e}", param="prompt") from e
            found.append((one, prompt_tokens(tokenizer, one)))
        elif isinstance(one, list) and one and all(type(i) is int for i in one):
            if not all(0 <= i < tokenizer.vocab_size for i in one):
                raise Refused(
                    400, f"a token is not one of 0 .. {tokenizer.vocab_size - 1}", param="prompt"
                )
            ids = np.array(one, np.int32)
            found.append((decode_prompt(tokenizer, ids), ids))
        else:
            raise Refused(400, "a prompt is neither text nor tokens", param="prompt")
    return found


def _number(body: dict, name: str, default: int, least: int, most: int) -> int:
    value = body.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise Refused(
            400, f"{name}={shown(value)} must be a whole number from {least} to {most}", param=name
        )
    return value


def _flag(body: dict, name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise Refused(400, f"{name}={shown(value)} must be true or false", param=name)
    return value


Row = tuple[int, float | None, Sequence, int]  # see `Continuation.told`; None: nothing in front


def prompt_rows(prompt: np.ndarray, scores: Scores, tokenizer: Tokenizer) -> list[Row]:
    """Returns the rows that tell of a prompt's tokens."""
    detokenizer, at, rows = IncrementalDetokenizer(tokenizer), 0, []
    for k, token in enumerate(prompt.tolist()):
        score, best = None, ()
        if k:
            score = float(scores.tokens[k - 1])
            best = (scores.best_ids[k - 1].tolist(), scores.best[k - 1].tolist())
        rows.append((token, score, best, at))
        at += len(detokenizer.add(token))
    return rows


def logprobs(rows: list[Row], count: int, tokenizer: Tokenizer) -> dict:
    """Returns OpenAI's `logprobs` with `count` alternatives to each token. The token itself is
    always among them; where two have the same text, that has the better's log-probability.

    Raises:
      Refused: 500, where the model's numbers are not finite.
    """
    pieces, scores, tops = [], [], []
    for token, score, best, _ in rows:
        pieces.append(piece_of(tokenizer, token))
        scores.append(None if score is None else _finite(score))
        top = {}
        for i, value in [*zip(*best, strict=True)][:count]:
            if value > -math.inf:
                top.setdefault(piece_of(tokenizer, i), _finite(value))
        if score is not None:
            top[pieces[-1]] = max(_finite(score), top.get(pieces[-1], LEAST))
        tops.append(None if score is None else top)
    return {
        "tokens": pieces,
        "token_logprobs": scores,
        "top_logprobs": tops,
        "text_offset": [at for *_, at in rows],
    }


def _finite(score: float) -> float:
    if math.isnan(score):
        raise Refused(500, "the model's probabilities are not numbers")
    return max(score, LEAST)


def piece_of(tokenizer: Tokenizer, token: int) -> str:
    """Returns a token's text as OpenAI shows it: `bytes:\\xe2\\x82` where it is a part of a
    character."""
    if token == tokenizer.end_of_text:
        return END_OF_TEXT
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage(asked: Asked, states: list[Continuation]) -> dict:
    """Returns an answer's token counts; a prompt counts once however many its choices."""
    unique = {id(tokens): len(tokens) for tokens in asked.prompts}
    prompt, completion = sum(unique.values()), sum(len(state.tokens) for state in states)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
