"""The HTTP interface: /v1/completions as OpenAI's, /v1/models, /healthz, and a page to try it."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxgpt.serving.batcher import Batcher, Busy, Job
from jaxgpt.serving.openai import Asked, Refused, choice, understood, usage

MAX_BODY = 1 << 20  # bytes
LISTENING = 0.5  # seconds between two looks whether the client is still there
PAGE = Path(__file__).with_name("page.html")


def make_app(batcher: Batcher, model: str) -> Starlette:
    """Returns the ASGI application that answers from `batcher` under the name `model`."""

    async def completions(request: Request) -> Response:
        asked = understood(await _body(request), model, batcher.tokenizer, batcher.decoder.cfg)
        answer = Answer(batcher, asked, model)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return await answer.whole(request)

    async def models(request: Request) -> Response:
        entry = {"id": model, "object": "model", "created": 0, "owned_by": "jaxgpt"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def one_model(request: Request) -> Response:
        if (name := request.path_params["name"]) != model:
            raise Refused(404, f"there is no model {name!r}, only {model!r}", "model_not_found")
        return JSONResponse({"id": model, "object": "model", "created": 0, "owned_by": "jaxgpt"})

    async def health(request: Request) -> Response:
        counts = {"active": batcher.active, "waiting": len(batcher.waiting)}
        if batcher.closing:
            return JSONResponse({"status": "closing"} | counts, 503)
        return JSONResponse({"status": "ok"} | counts)

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE.read_text())

    return Starlette(
        routes=[
            Route("/", page),
            Route("/healthz", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        exception_handlers={Refused: _refused, HTTPException: _no_such},
    )


async def _body(request: Request) -> object:
    length, pieces = 0, []
    try:
        async for piece in request.stream():
            length += len(piece)
            if length > MAX_BODY:
                raise Refused(413, f"the body has more than {MAX_BODY} bytes")
            pieces.append(piece)
    except ClientDisconnect as e:
        raise Refused(400, "the client has gone") from e
    try:
        return json.loads(b"".join(pieces))
    except (ValueError, RecursionError) as e:
        raise Refused(400, "the body is not JSON in UTF-8") from e


async def _refused(request: Request, e: Refused) -> Response:
    headers = {"Retry-After": "1"} if e.status in (429, 503) else None
    return JSONResponse(e.body(), e.status, headers)


async def _no_such(request: Request, e: HTTPException) -> Response:
    what = f"{request.method} {request.url.path}: {e.detail.lower()}"
    return JSONResponse(Refused(e.status_code, what).body(), e.status_code, e.headers)


class Answer:
    """One completions request on its way: its jobs, and what they have said so far."""

    def __init__(self, batcher: Batcher, asked: Asked, model: str):
        self.batcher, self.asked, self.model = batcher, asked, model
        self.news: asyncio.Queue[tuple[int, str, str, int]] = asyncio.Queue()
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.jobs: list[Job] = []
        try:
            for i, (prompt, request) in enumerate(zip(asked.prompts, asked.requests, strict=True)):
                self.jobs.append(batcher.submit(prompt, request, self._hearing(i)))
        except Busy as e:
            self._cancel()
            if batcher.closing:
                raise Refused(503, "the server is shutting down") from e
            raise Refused(429, "too many requests wait already; try again", "rate_limit") from e

    def _hearing(self, i: int):
        loop = asyncio.get_running_loop()

        def heard(piece, text) -> None:
            with suppress(RuntimeError):  # the loop has closed: nobody listens
                told = (i, piece, text.finish, len(text.tokens))
                loop.call_soon_threadsafe(self.news.put_nowait, told)

        return heard

    def _cancel(self) -> None:
        for job in self.jobs:
            self.batcher.cancel(job)

    def _answer(self, choices: list[dict], **more) -> dict:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def _choice(
        self, i: int, text: str, told: slice = slice(None), finish: str | None = None
    ) -> dict:
        job = self.jobs[i]
        found = choice(i, text, job.text, self.batcher.tokenizer, self.asked.logprobs, told)
        return found | ({} if finish is None else {"finish_reason": finish or None})

    async def whole(self, request: Request) -> Response:
        """Returns the answer once every choice is finished.

        Raises:
          Refused: 503 where the server shuts down first.
        """
        left = len(self.jobs)
        try:
            while left:
                try:
                    _, _, finish, _ = await asyncio.wait_for(self.news.get(), LISTENING)
                except TimeoutError:
                    if await request.is_disconnected():
                        return Response(status_code=499)
                    continue
                if finish == "closed":
                    raise Refused(503, "the server is shutting down")
                left -= bool(finish)
        finally:
            self._cancel()
        prompts = [request.prompt if self.asked.echo else "" for request in self.asked.requests]
        choices = [self._choice(i, prompts[i] + job.text.text) for i, job in enumerate(self.jobs)]
        counts = usage(self.asked, [job.text for job in self.jobs])
        return JSONResponse(self._answer(choices, usage=counts))

    async def events(self) -> AsyncIterator[str]:
        """Yields server-sent events: a piece of a choice each, then `[DONE]`."""
        left, told = len(self.jobs), [0] * len(self.jobs)
        try:
            if self.asked.echo:
                for i, request in enumerate(self.asked.requests):
                    yield _event(self._answer([self._choice(i, request.prompt, slice(0, 0), "")]))
            while left:
                i, piece, finish, tokens = await self.news.get()
                if finish == "closed":
                    yield _event(Refused(503, "the server is shutting down").body())
                    return
                yield _event(self._answer([self._choice(i, piece, slice(told[i], tokens), finish)]))
                told[i] = tokens
                left -= bool(finish)
            if self.asked.include_usage:
                counts = usage(self.asked, [job.text for job in self.jobs])
                yield _event(self._answer([], usage=counts))
            yield "data: [DONE]\n\n"
        finally:
            self._cancel()  # where the client has gone, too


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
