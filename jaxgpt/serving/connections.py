"""The server's connections: idle ones are closed, so that new clients are always let in.

uvicorn closes a connection that is idle after a response, but waits forever for a first request or
for the rest of one; and at the limit of open files it accepts no new connection.
"""

import asyncio
import json
import resource
from collections.abc import Callable

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxgpt.serving.openai import ApiError

OTHER_FILES = 64  # open files that are not connections: libraries, the listening socket, ...
MAX_CONNECTIONS = 4096


def most_connections() -> int:
    """Returns how many connections this process's limit of open files allows."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(min(limit - OTHER_FILES, MAX_CONNECTIONS), 8)


def connection_class(most: int, seconds: float) -> type[H11Protocol]:
    """Returns uvicorn's protocol with a deadline: a request must be complete within `seconds` of
    the connection's start or of the response before it. Beyond `most` connections the oldest idle
    one is closed for a new one; if none is idle, the new one gets a 503.
    """

    class Connection(H11Protocol):
        connected: dict["Connection", None] = {}  # oldest first

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connected) >= most:
                idle = next((one for one in self.connected if one.is_idle()), None)
                if idle is None:
                    self.refuse(ApiError(503, "too many connections; try again"))
                    return
                idle.cut()
            self.connected[self] = None
            self.timer = self.loop.call_later(seconds, self.expire)

        def connection_lost(self, exc: Exception | None) -> None:
            self.forget()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self in self.connected:
                self.timer.cancel()
                self.timer = self.loop.call_later(seconds, self.expire)

        def is_idle(self) -> bool:
            """Says whether no complete request waits for its response."""
            cycle = self.cycle
            return cycle is None or cycle.response_complete or cycle.more_body

        def expire(self) -> None:
            if self.is_idle():
                self.cut()

        def cut(self) -> None:
            self.forget()
            self.transport.abort()

        def forget(self) -> None:
            if self in self.connected:
                del self.connected[self]
                self.timer.cancel()

        def send_400_response(self, msg: str) -> None:
            self.refuse(ApiError(400, msg.rstrip(".")))

        def refuse(self, e: ApiError) -> None:
            body = json.dumps(e.body()).encode()
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                head = f"HTTP/1.1 {e.status_code} -\r\nContent-Type: application/json\r\n"
                head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                self.transport.write(head.encode() + body)
            self.transport.close()

    return Connection


class Server(uvicorn.Server):
    """uvicorn's server, which ends when `alive()` is false, and calls `close` at its shutdown while
    it waits for its responses."""

    def __init__(self, config: uvicorn.Config, close: Callable, alive: Callable[[], bool]):
        super().__init__(config)
        self.close, self.alive = close, alive

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or not self.alive()

    async def shutdown(self, sockets=None) -> None:
        closing = asyncio.create_task(asyncio.to_thread(self.close))
        await super().shutdown(sockets)
        await closing
