"""The HTTP interface: /v1/completions as OpenAI's, /v1/models, /healthz, and a page to try it."""

import asyncio
import html
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxgpt.data.show import NO_EXAMPLE, Example
from jaxgpt.inference.chat import Chat
from jaxgpt.inference.generation import Continuation, TokenLogprob
from jaxgpt.serving.batcher import Batcher, Busy, Group, Job
from jaxgpt.serving.guard import Guard
from jaxgpt.serving.openai import (
    NOT_FINITE,
    ApiError,
    CompletionRequest,
    json_response,
    logprobs_object,
    parse_body,
    prompt_details,
    usage,
)

MAX_BODY = 1 << 20  # bytes
DISCONNECT_POLL = 0.5  # seconds between two checks that the client is still connected
SHUTTING_DOWN = "the server is shutting down"
PAGE = Path(__file__).with_name("page.html")


def page(example: Example) -> str:
    """Returns the page to try a run, with the example as its first prompt."""
    chat, prompt = json.dumps(example.is_chat), html.escape(example.prompt)
    return PAGE.read_text("utf-8").replace("<!--CHAT-->", chat).replace("<!--PROMPT-->", prompt)


def make_app(
    batcher: Batcher,
    model: str,
    guard: Guard,
    seconds: float = 30,
    example: Example = NO_EXAMPLE,
    chat: Chat | None = None,
) -> Starlette:
    """Returns the ASGI application that answers from `batcher`, under the name `model`, the
    requests that `guard` lets in. A request's body must be complete within `seconds`. `chat` is the
    run's, if it has one."""
    first_page = page(example)
    entry = {"id": model, "object": "model", "created": 0, "owned_by": "jaxgpt"}

    async def completions(request: Request) -> Response:
        try:
            async with asyncio.timeout(seconds):
                body = await _read_body(request)
        except TimeoutError as e:
            raise ApiError(408, f"the body was not whole after {seconds:g} seconds") from e
        parsed = await asyncio.to_thread(  # tokenizing a long prompt must not block other requests
            parse_body, body, model, batcher.tokenizer, batcher.decoder.spec.model, chat
        )
        completion = Completion(batcher, parsed, model)
        if parsed.stream:
            return StreamingResponse(completion.events(), media_type="text/event-stream")
        return await completion.response(request)

    async def models(request: Request) -> Response:
        return json_response({"object": "list", "data": [entry]})

    async def one_model(request: Request) -> Response:
        if (name := request.path_params["name"]) != model:
            raise ApiError(404, f"there is no model {name!r}, only {model!r}", "model_not_found")
        return json_response(entry)

    async def health(request: Request) -> Response:
        text, status = ("closing", 503) if batcher.closing else ("ok", 200)
        counts = {"active": batcher.active, "waiting": len(batcher.waiting)}
        return json_response({"status": text, "model": model} | counts, status)

    return Starlette(
        routes=[
            Route("/", lambda request: HTMLResponse(first_page)),
            Route("/healthz", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _server_error},
        middleware=[Middleware(guard)],
    )


async def _read_body(request: Request) -> object:
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                raise ApiError(413, f"the body has more than {MAX_BODY} bytes")
    except ClientDisconnect as e:
        raise ApiError(400, "the client has disconnected") from e
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, "the body is not JSON in UTF-8") from e


async def _http_error(request: Request, e: HTTPException) -> Response:
    if isinstance(e, ApiError):
        return e.response()
    message = f"{request.method} {request.url.path}: {e.detail.lower()}"  # starlette: 404, 405
    return json_response(ApiError(e.status_code, message).body(), e.status_code, e.headers)


async def _server_error(request: Request, e: Exception) -> Response:
    return ApiError(500, f"a fault of the server: {type(e).__name__}").response()


class Completion:
    """One completions request in progress: its jobs, and the text that they have generated. Raises
    `ApiError`: 400 if there are more choices than the server takes, 429 or 503 if it is busy."""

    def __init__(self, batcher: Batcher, request: CompletionRequest, model: str):
        self.batcher, self.request, self.tokenizer = batcher, request, batcher.tokenizer
        # (choice, text just added, finish reason, number of tokens shown so far)
        self.updates: asyncio.Queue[tuple[int, str, str, int]] = asyncio.Queue()
        name, created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.header = dict(id=name, object="text_completion", created=created, model=model)
        if len(request.choices) > batcher.capacity:
            raise ApiError(400, f"this server takes at most {batcher.capacity} choices", param="n")
        with_prompt = request.echo and request.logprobs >= 0
        group = Group(with_top=request.logprobs > 0, with_prompt_logprobs=with_prompt)
        self.loop = asyncio.get_running_loop()
        choices = [(*choice, partial(self._on_text, i)) for i, choice in enumerate(request.choices)]
        try:
            self.jobs = batcher.submit(choices, group)
        except Busy as e:
            if batcher.closing:
                raise ApiError(503, SHUTTING_DOWN) from e
            raise ApiError(429, "the queue is full; try again", "rate_limit_exceeded") from e

    def _on_text(self, i: int, new: str, text: Continuation) -> None:
        """Takes the next text of choice `i`; the batcher's thread calls it."""
        if not (self.request.stream or text.finish_reason):
            return  # nobody reads it yet, and waking the loop takes longer than generating it
        update = (i, new, text.finish_reason, text.num_shown)
        with suppress(RuntimeError):  # the loop is closed: nobody waits for the text
            self.loop.call_soon_threadsafe(self.updates.put_nowait, update)

    def _choice(self, i: int, text: str, details: list[TokenLogprob], finish: str) -> dict:
        """Returns choice `i` with `text`, whose tokens are those of `details`; raises a 500 if the
        model's numbers are not finite."""
        if finish == "broken":
            raise ApiError(500, NOT_FINITE)
        logprobs = None
        if self.request.logprobs >= 0:
            logprobs = logprobs_object(details, self.request.logprobs, self.tokenizer)
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish or None}

    def _echo(self, job: Job) -> tuple[str, list[TokenLogprob]]:
        """Returns the prompt's text and the details of its tokens, if they are to be echoed."""
        if not self.request.echo:
            return "", []
        scored = job.prompt_logprobs
        details = prompt_details(job.prompt, scored, self.tokenizer) if scored else []
        return job.request.prompt, details

    def _usage(self) -> dict:
        return usage(self.request, [job.text for job in self.jobs])

    async def _update(self, timeout: float | None = None) -> tuple[int, str, str, int]:
        update = await asyncio.wait_for(self.updates.get(), timeout)
        if update[2] == "closed":
            raise ApiError(503, SHUTTING_DOWN)
        return update

    async def response(self, request: Request) -> Response:
        """Returns the whole response once every choice is finished. Raises `ApiError`: 503 if the
        server shuts down first, 500 if the model's numbers are not finite."""
        unfinished = len(self.jobs)
        try:
            while unfinished:
                try:
                    _, _, finish, _ = await self._update(DISCONNECT_POLL)
                    unfinished -= bool(finish)
                except TimeoutError:
                    if await request.is_disconnected():
                        return Response(status_code=499)
        finally:
            self.batcher.cancel(self.jobs)
        choices = []
        for i, job in enumerate(self.jobs):
            prompt, details = self._echo(job)
            details = details + job.text.details[: job.text.num_shown]
            choices.append(self._choice(i, prompt + job.text.text, details, job.text.finish_reason))
        return json_response(self.header | {"choices": choices, "usage": self._usage()})

    async def events(self) -> AsyncIterator[str]:
        """Yields server-sent events: a piece of a choice each, then `[DONE]`."""
        unfinished, shown = len(self.jobs), [0] * len(self.jobs)
        to_echo = set(range(unfinished)) if self.request.echo else set()
        try:
            while unfinished:
                i, new, finish, num_shown = await self._update()
                if i in to_echo:  # not earlier: only now are the prompt's log-probabilities there
                    to_echo.remove(i)
                    choice = self._choice(i, *self._echo(self.jobs[i]), "")
                    yield _event(self.header | {"choices": [choice]})
                details = self.jobs[i].text.details[shown[i] : num_shown]
                yield _event(self.header | {"choices": [self._choice(i, new, details, finish)]})
                shown[i] = num_shown
                unfinished -= bool(finish)
            if self.request.include_usage:
                yield _event(self.header | {"choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except ApiError as e:
            yield _event(e.body())
        finally:
            self.batcher.cancel(self.jobs)  # the client may have disconnected


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"
