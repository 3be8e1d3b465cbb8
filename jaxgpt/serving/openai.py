"""OpenAI's completions API: what a request's body may hold, and the parts of a response."""

import dataclasses
import json
import math
import reprlib
import secrets
from collections.abc import Mapping

import numpy as np
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jaxgpt.config import ModelConfig
from jaxgpt.inference.chat import Chat
from jaxgpt.inference.decode import NUM_TOP, Logprobs, check_length
from jaxgpt.inference.generation import Continuation, TokenLogprob, encode_request, with_suffix
from jaxgpt.inference.requests import GenerationRequest, Sampling, parse_request
from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import IncrementalDetokenizer, Tokenizer, decode_prompt

END_OF_TEXT = "<|endoftext|>"
MIN_LOGPROB = -9999.0  # what OpenAI gives for the logarithm of 0

NOT_FINITE = "the model's probabilities are not numbers"

MAX_CHOICES = 16  # prompts times n
MAX_STOPS = 4
# Fields of OpenAI's that may only have the value that has no effect.
UNSUPPORTED = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
SAMPLING_FIELDS = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop"}
FIELDS = SAMPLING_FIELDS | set(UNSUPPORTED)
FIELDS |= {"model", "prompt", "max_tokens", "n", "best_of", "logprobs", "echo", "user"}
FIELDS |= {"stream", "stream_options", "chat", "suffix"}


class ApiError(HTTPException):
    """A request that gets an error for an answer: HTTP status, message, and OpenAI's `code` and
    `param`."""

    def __init__(self, status: int, message: str, code: str = "", param: str = ""):
        super().__init__(status, message, {"Retry-After": "1"} if status in (429, 503) else None)
        self.code, self.param = code, param

    def body(self) -> dict:
        """Returns OpenAI's error object."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        error = {"message": self.detail, "type": kind}
        return {"error": error | {"param": self.param or None, "code": self.code or None}}

    def response(self) -> Response:
        """Returns the error as a response."""
        return json_response(self.body(), self.status_code, self.headers)


def json_response(value: object, status: int = 200, headers: Mapping | None = None) -> Response:
    """Returns a JSON response in ASCII: starlette's own would fail on a lone surrogate, which a
    message may quote."""
    text = json.dumps(value, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A parsed body: the choices to generate, with the ids of their prompts, and how to answer."""

    choices: list[tuple[np.ndarray, GenerationRequest]]
    stream: bool
    logprobs: int  # how many alternatives to each token; -1: no log-probabilities at all
    echo: bool
    include_usage: bool


def parse_body(
    body: object, model: str, tokenizer: Tokenizer, cfg: ModelConfig, chat: Chat | None = None
) -> CompletionRequest:
    """Returns what a completions body asks for. Our field `chat` says that each prompt is a message
    to reply to in the template of `chat`. Raises `ApiError`: 400 or 404, naming the field."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    if unknown := sorted(set(body) - FIELDS):
        raise ApiError(400, f"unknown field {reprlib.repr(unknown[0])}", param=unknown[0])
    body = {name: value for name, value in body.items() if value is not None}
    if (name := body.get("model", model)) != model:
        message = f"there is no model {reprlib.repr(name)}, only {model!r}"
        raise ApiError(404, message, "model_not_found")
    for name, neutral in UNSUPPORTED.items():
        if body.get(name, neutral) != neutral:
            raise ApiError(400, f"{name} is not supported", param=name)
    n = _integer(body, "n", 1, 1, MAX_CHOICES)
    if _integer(body, "best_of", n, 1, MAX_CHOICES) != n:
        raise ApiError(400, "best_of is not supported but for the value of n", param="best_of")
    if not _boolean(body, "chat"):
        chat = None
    elif chat is None:
        raise ApiError(400, "this model has no chat template", param="chat")
    try:
        suffix = _parse_suffix(body)
        prompts = _parse_prompts(body.get("prompt", ""), tokenizer, chat, suffix)
    except BadInput as e:
        raise ApiError(400, str(e), param="suffix") from e
    if len(prompts) * n > MAX_CHOICES:
        message = f"{len(prompts)} prompts times n={n} are more than {MAX_CHOICES} choices"
        raise ApiError(400, message)
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    return CompletionRequest(
        choices=[
            (ids, dataclasses.replace(_parse_choice(body, ids, text, cfg, chat), sample_index=i))
            for ids, text in prompts
            for i in range(n)
        ],
        stream=_boolean(body, "stream"),
        logprobs=_integer(body, "logprobs", 0, 0, NUM_TOP) if "logprobs" in body else -1,
        echo=_boolean(body, "echo"),
        include_usage=_boolean(options, "include_usage"),
    )


def _parse_choice(
    body: dict, prompt: np.ndarray, text: str, cfg: ModelConfig, chat: Chat | None
) -> GenerationRequest:
    """Returns the generation request for one of the body's prompts, given as ids and as text."""
    row = {name: body[name] for name in SAMPLING_FIELDS & set(body)}
    if "max_tokens" in body:
        row["max_new_tokens"] = body["max_tokens"]
    row.setdefault("seed", secrets.randbits(32))
    if isinstance(row.get("stop"), list) and len(row["stop"]) > MAX_STOPS:
        raise ApiError(400, f"stop has more than {MAX_STOPS} strings", param="stop")
    default = GenerationRequest("", 16, Sampling(1.0, 0))
    try:
        request = parse_request(row | {"prompt": text}, default, "body", min_new_tokens=0)
    except BadInput as e:
        message = str(e).removeprefix("body: ").replace("max_new_tokens", "max_tokens")
        raise ApiError(400, message, param=message.partition("=")[0]) from e
    room = cfg.max_seq_len - len(prompt)
    try:
        check_length(len(prompt), request.max_new_tokens, cfg)
        if request.max_new_tokens > room:  # the model's context slides, a slot's cache does not
            raise BadInput(
                f"a slot holds {cfg.max_seq_len} tokens: ask for at most {room} new tokens"
            )
    except BadInput as e:
        message = str(e).replace("--max_new_tokens", "max_tokens")
        raise ApiError(400, message, "context_length_exceeded") from e
    return dataclasses.replace(request, stop=(*request.stop, chat.stop)) if chat else request


def _parse_prompts(
    given: object, tokenizer: Tokenizer, chat: Chat | None, suffix: str
) -> list[tuple[np.ndarray, str]]:
    """Returns ids and text of each prompt: `given` is a string, ids, or a list of either. With a
    `suffix` the ids ask for the text up to it; raises `BadInput` if the tokenizer has no marks."""
    if isinstance(given, str) or (isinstance(given, list) and given and type(given[0]) is int):
        given = [given]
    if not isinstance(given, list) or not given or len(given) > MAX_CHOICES:
        message = f"prompt must be text, tokens, or a list of 1 to {MAX_CHOICES} of either"
        raise ApiError(400, message, param="prompt")
    return [_parse_prompt(prompt, tokenizer, chat, suffix) for prompt in given]


def _parse_prompt(
    prompt: object, tokenizer: Tokenizer, chat: Chat | None, suffix: str
) -> tuple[np.ndarray, str]:
    if isinstance(prompt, str):
        try:
            check_text(prompt, "a prompt")
        except BadInput as e:
            raise ApiError(400, f"not valid text: {e}", param="prompt") from e
        asked = GenerationRequest(prompt, suffix=suffix)
        asked = chat.ask(asked) if chat else asked
        return encode_request(tokenizer, asked), asked.prompt
    if chat:
        raise ApiError(400, "a message of a chat must be text", param="prompt")
    if not isinstance(prompt, list) or not prompt or any(type(i) is not int for i in prompt):
        raise ApiError(400, "a prompt is neither text nor tokens", param="prompt")
    if not all(0 <= i < tokenizer.vocab_size for i in prompt):
        message = f"a token is not one of 0 .. {tokenizer.vocab_size - 1}"
        raise ApiError(400, message, param="prompt")
    ids = np.array(prompt, np.int32)
    text = decode_prompt(tokenizer, ids)
    return with_suffix(tokenizer, ids, suffix) if suffix else ids, text


def _parse_suffix(body: dict) -> str:
    suffix = body.get("suffix", "")
    if not isinstance(suffix, str):
        raise ApiError(400, "suffix must be text", param="suffix")
    for name in ("chat", "echo"):
        if suffix and body.get(name):
            raise ApiError(400, f"suffix and {name} do not go together", param="suffix")
    return check_text(suffix, "suffix")


def _integer(body: dict, name: str, default: int, low: int, high: int) -> int:
    value = body.get(name, default)
    if type(value) is not int or not low <= value <= high:
        message = f"{name}={reprlib.repr(value)} must be a whole number from {low} to {high}"
        raise ApiError(400, message, param=name)
    return value


def _boolean(body: dict, name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name}={reprlib.repr(value)} must be true or false", param=name)
    return value


def prompt_details(ids: np.ndarray, rest: Logprobs, tokenizer: Tokenizer) -> list[TokenLogprob]:
    """Returns the details of a prompt's tokens; `rest` holds the log-probabilities of all but the
    first."""
    detokenizer, offset, details = IncrementalDetokenizer(tokenizer), 0, []
    logprobs, tops = [None, *rest.chosen.tolist()], [[], *rest.top_pairs()]
    for token, logprob, top in zip(ids.tolist(), logprobs, tops, strict=True):
        details.append(TokenLogprob(token, logprob, top, offset))
        offset += len(detokenizer.add(token))
    return details


def logprobs_object(details: list[TokenLogprob], count: int, tokenizer: Tokenizer) -> dict:
    """Returns OpenAI's `logprobs` with `count` alternatives to each token; raises a 500 for a
    log-probability that is not a number. The token itself is always among the alternatives; of two
    with the same text, the higher log-probability counts."""
    tokens, logprobs, tops = [], [], []
    for token, logprob, alternatives, _ in details:
        text, top = token_text(tokenizer, token), None
        if logprob is not None:
            if math.isnan(logprob):
                raise ApiError(500, NOT_FINITE)
            logprob, top = max(logprob, MIN_LOGPROB), {}
            for i, value in alternatives[:count]:
                if value > -math.inf:
                    top.setdefault(token_text(tokenizer, i), max(value, MIN_LOGPROB))
            top[text] = max(logprob, top.get(text, MIN_LOGPROB))
        tokens.append(text)
        logprobs.append(logprob)
        tops.append(top)
    offsets = [detail.offset for detail in details]
    return dict(tokens=tokens, token_logprobs=logprobs, top_logprobs=tops, text_offset=offsets)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Returns a token's text as OpenAI shows it: `bytes:\\xe2\\x82` for a part of a character."""
    if token == tokenizer.end_of_text:
        return END_OF_TEXT
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage(request: CompletionRequest, texts: list[Continuation]) -> dict:
    """Returns a response's token counts; a prompt counts once however many choices it has."""
    prompt = sum({id(ids): len(ids) for ids, _ in request.choices}.values())
    completion = sum(len(text.tokens) for text in texts)
    total = prompt + completion
    return dict(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total)
