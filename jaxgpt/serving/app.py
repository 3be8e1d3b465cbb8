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
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxgpt.serving.batcher import Batcher, Busy, Group
from jaxgpt.serving.guard import Guard, refusal, reply
from jaxgpt.serving.openai import Asked, Refused, logprobs, prompt_rows, understood, usage

MAX_BODY = 1 << 20  # bytes
LISTENING = 0.5  # seconds between two looks whether the client is still there
PAGE = Path(__file__).with_name("page.html")


def make_app(batcher: Batcher, model: str, guard: Guard, seconds: float = 30) -> Starlette:
    """Returns the ASGI application that answers from `batcher` under the name `model` to whom
    `guard` lets in. A body must be whole within `seconds`."""

    async def completions(request: Request) -> Response:
        try:
            async with asyncio.timeout(seconds):
                body = await _body(request)
        except TimeoutError as e:
            raise Refused(408, f"the body was not whole after {seconds:g} seconds") from e
        asked = await asyncio.to_thread(  # a long prompt is tokenized beside other answers
            understood, body, model, batcher.tokenizer, batcher.decoder.cfg
        )
        answer = Answer(batcher, asked, model)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return await answer.whole(request)

    async def models(request: Request) -> Response:
        entry = {"id": model, "object": "model", "created": 0, "owned_by": "jaxgpt"}
        return reply({"object": "list", "data": [entry]})

    async def one_model(request: Request) -> Response:
        if (name := request.path_params["name"]) != model:
            raise Refused(404, f"there is no model {name!r}, only {model!r}", "model_not_found")
        return reply({"id": model, "object": "model", "created": 0, "owned_by": "jaxgpt"})

    async def health(request: Request) -> Response:
        counts = {"model": model, "active": batcher.active, "waiting": len(batcher.waiting)}
        if batcher.closing:
            return reply({"status": "closing"} | counts, 503)
        return reply({"status": "ok"} | counts)

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
        exception_handlers={
            Refused: lambda request, e: refusal(e),
            HTTPException: _no_such,
            Exception: _failed,
        },
        middleware=[Middleware(guard)],
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


async def _no_such(request: Request, e: HTTPException) -> Response:
    what = f"{request.method} {request.url.path}: {e.detail.lower()}"
    return reply(Refused(e.status_code, what).body(), e.status_code, e.headers)


async def _failed(request: Request, e: Exception) -> Response:
    return refusal(Refused(500, f"a fault of the server: {type(e).__name__}"))


class Answer:
    """One completions request on its way: its jobs, and what they have said so far."""

    def __init__(self, batcher: Batcher, asked: Asked, model: str):
        self.batcher, self.asked, self.model = batcher, asked, model
        self.tokenizer = batcher.tokenizer
        self.news: asyncio.Queue[tuple[int, str, str, int]] = asyncio.Queue()
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        pairs = zip(asked.prompts, asked.requests, strict=True)
        wanted = [(*pair, self._hearing(i)) for i, pair in enumerate(pairs)]
        group = Group(best=asked.logprobs > 0, prompt_scores=asked.echo and asked.logprobs >= 0)
        if len(wanted) > batcher.capacity:
            raise Refused(400, f"this server takes at most {batcher.capacity} choices", param="n")
        try:
            self.jobs = batcher.submit(wanted, group)
        except Busy as e:
            if batcher.closing:
                raise Refused(503, "the server is shutting down") from e
            raise Refused(
                429, "too many requests wait already; try again", "rate_limit_exceeded"
            ) from e

    def _hearing(self, i: int):
        loop = asyncio.get_running_loop()

        def heard(piece, text) -> None:
            with suppress(RuntimeError):  # the loop has closed: nobody listens
                told = (i, piece, text.finish, text.num_told)
                loop.call_soon_threadsafe(self.news.put_nowait, told)

        return heard

    def _answer(self, choices: list[dict], **more) -> dict:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def _choice(self, i: int, text: str, told: slice, finish: str, prompt: bool = False) -> dict:
        """Returns choice `i` with `text`, the tokens `told` of its continuation, and before them
        those of its prompt if `prompt`.

        Raises:
          Refused: 500, where the model's numbers are not finite.
        """
        job, found = self.jobs[i], None
        if finish == "broken":
            raise Refused(500, "the model's probabilities are not numbers")
        if self.asked.logprobs >= 0:
            rows, length, tokenizer = job.text.told[told], len(job.request.prompt), self.tokenizer
            rows = [(*row, length + at) for *row, at in rows]
            if prompt and job.prompt_scores:
                rows = prompt_rows(job.prompt, job.prompt_scores, tokenizer) + rows
            found = logprobs(rows, self.asked.logprobs, tokenizer)
        return {"index": i, "text": text, "logprobs": found, "finish_reason": finish or None}

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
            self.batcher.cancel(self.jobs)
        echo, choices = self.asked.echo, []
        for i, job in enumerate(self.jobs):
            text = job.request.prompt * echo + job.text.text
            told = slice(0, job.text.num_told)
            choices.append(self._choice(i, text, told, job.text.finish, prompt=echo))
        counts = usage(self.asked, [job.text for job in self.jobs])
        return reply(self._answer(choices, usage=counts))

    async def events(self) -> AsyncIterator[str]:
        """Yields server-sent events: a piece of a choice each, then `[DONE]`."""
        left, told = len(self.jobs), [0] * len(self.jobs)
        unechoed = set(range(left)) if self.asked.echo else set()
        try:
            while left:
                i, piece, finish, tokens = await self.news.get()
                if finish == "closed":
                    yield _event(Refused(503, "the server is shutting down").body())
                    return
                if i in unechoed:  # not before: its prompt has its scores now
                    unechoed.remove(i)
                    prompt = self.jobs[i].request.prompt
                    echoed = self._choice(i, prompt, slice(0, 0), "", prompt=True)
                    yield _event(self._answer([echoed]))
                found = self._choice(i, piece, slice(told[i], tokens), finish)
                yield _event(self._answer([found]))
                told[i] = tokens
                left -= bool(finish)
            if self.asked.include_usage:
                counts = usage(self.asked, [job.text for job in self.jobs])
                yield _event(self._answer([], usage=counts))
            yield "data: [DONE]\n\n"
        except Refused as e:
            yield _event(e.body())
        finally:
            self.batcher.cancel(self.jobs)  # where the client has gone, too


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"
