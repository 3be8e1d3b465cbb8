"""Who may ask: what a web page elsewhere must not do, and the key.

A page of any site may have a browser send requests to this machine. So a request must be JSON
(which a page may not send to another origin without asking first), its Origin must be ours, and its
Host a name of ours: another name that leads to this machine is a page that calls itself so (DNS
rebinding).
"""

import hmac
import ipaddress
import json
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxgpt.serving.openai import Refused
from jaxgpt.system.errors import BadInput


def reply(value: object, status: int = 200, headers: dict | None = None) -> Response:
    """Returns an answer of JSON, in ASCII: its text may quote what is no valid text."""
    text = json.dumps(value, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def refusal(e: Refused) -> Response:
    """Returns OpenAI's error object as an answer."""
    headers = {"Retry-After": "1"} if e.status in (429, 503) else None
    return reply(e.body(), e.status, headers)


class Guard:
    """Middleware for an ASGI application: `Guard(host, origins, key)(app)`.

    `host` is the address listened at; pages of `origins` (like http://name:8080, or * for all) may
    ask too, under these names. With a `key`, /v1/ wants it as `Authorization: Bearer KEY`.
    """

    def __init__(self, host: str, origins: Sequence[str] = (), key: str = ""):
        self.origins, self.key = [origin.rstrip("/").lower() for origin in origins], key
        for origin, given in zip(self.origins, origins, strict=True):
            parts = split(origin)
            if origin != "*" and origin != f"{parts.scheme}://{parts.netloc}":
                raise BadInput(f"--allow_origin={given} must be like https://name:8080, or *")
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        self.names |= {split(origin).hostname for origin in self.origins}

    def __call__(self, app: ASGIApp) -> ASGIApp:
        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            headers = Headers(scope=scope)
            origin = headers.get("origin", "")
            answer, extra = app, {}
            try:
                self._check_names(headers.get("host", ""), origin)
                if origin:
                    extra = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    extra["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
                    extra["Access-Control-Allow-Methods"] = "GET, POST"
                    answer = Response(status_code=204)
                else:
                    self._check_request(scope, headers)
            except Refused as e:
                answer = refusal(e)

            async def send_more(message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(extra)
                await send(message)

            await answer(scope, receive, send_more)

        return guarded

    def _check_names(self, host: str, origin: str) -> None:
        if "*" in self.origins:
            return
        name = split(f"//{host}").hostname or ""
        if host and not (name in self.names or _is_address(name)):
            raise Refused(403, f"this server is not {name!r}; --allow_origin=http://... names it")
        if origin and origin.lower() not in self.origins:
            if split(origin).netloc.lower() != host.lower():
                raise Refused(403, f"pages of {origin!r} may not ask; --allow_origin lets them")

    def _check_request(self, scope: Scope, headers: Headers) -> None:
        if self.key and scope["path"].startswith("/v1/"):
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
                raise Refused(401, "the API key is missing or wrong", "invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(415, f"Content-Type is {kind!r}; it must be application/json")


def split(url: str):
    """Returns `urlsplit`'s parts, empty ones for what is no URL."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises where it is no number)
    except ValueError:
        return urlsplit("")
    return parts


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
