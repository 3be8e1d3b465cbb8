"""Which requests are let in: protection from other sites' web pages, and the API key.

Any web page can make a browser send requests to this machine. So a request must be JSON (which a
page cannot send to another origin without a preflight request), its Origin must be ours or allowed,
and its Host a name of ours (a site's own name may be made to point at this machine: DNS rebinding).
"""

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxgpt.serving.openai import ApiError
from jaxgpt.system.errors import BadInput

ERROR_DELAY = 0.05  # seconds before an error is answered: else its client could keep the loop busy


class Guard:
    """Middleware for an ASGI application: `Guard(host, origins, key)(app)`.

    `host` is the address that the server listens at. Pages of `origins` (like http://name:8080, or
    * for all) are let in too, and the server may be called by their host names. With a `key`, /v1/
    requires `Authorization: Bearer KEY`. Every error is answered after ERROR_DELAY.

    Raises:
      BadInput: if an origin is not like http://name:8080.
    """

    def __init__(self, host: str, origins: Sequence[str] = (), key: str = ""):
        self.origins, self.key = [origin.rstrip("/").lower() for origin in origins], key
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        for origin in self.origins:
            parts = split(origin)
            if origin not in ("*", f"{parts.scheme}://{parts.netloc}"):
                raise BadInput(f"--allow_origin={origin} must be like https://name:8080, or *")
            self.names.add(parts.hostname)

    def __call__(self, app: ASGIApp) -> ASGIApp:
        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            headers = Headers(scope=scope)
            origin = headers.get("origin", "")
            response, cors = app, {}
            try:
                self._check_names(headers.get("host", ""), origin)
                if origin:
                    cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    cors["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
                    cors["Access-Control-Allow-Methods"] = "GET, POST"
                    response = Response(status_code=204)
                else:
                    self._check_request(scope, headers)
            except ApiError as e:
                response = e.response()

            async def send_with_cors(message) -> None:
                if message["type"] == "http.response.start":
                    if message["status"] >= 400:
                        await asyncio.sleep(ERROR_DELAY)
                    MutableHeaders(scope=message).update(cors)
                await send(message)

            await response(scope, receive, send_with_cors)

        return guarded

    def _check_names(self, host: str, origin: str) -> None:
        if "*" in self.origins:
            return
        name = split(f"//{host}").hostname or ""
        if host and not (name in self.names or _is_address(name)):
            raise ApiError(403, f"{name!r} is not a name of this server; see --allow_origin")
        if origin and origin.lower() not in self.origins:
            if split(origin).netloc.lower() != host.lower():
                raise ApiError(403, f"pages of {origin!r} are not let in; see --allow_origin")

    def _check_request(self, scope: Scope, headers: Headers) -> None:
        if self.key and scope["path"].startswith("/v1/"):
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
                raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, f"Content-Type is {kind!r}; it must be application/json")


def split(url: str):
    """Returns `urlsplit`'s parts, empty ones if `url` is not valid."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises if it is not a number)
    except ValueError:
        return urlsplit("")
    return parts


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
