"""The server's sockets: who says nothing is cut off, and signals end it with the right code.

uvicorn closes a connection that is idle after an answer, but waits for ever for a first request, or
for the rest of one; and at the limit of open files it accepts nobody.
"""

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxgpt.serving.openai import Refused

SPARE = 64  # files that are not connections: checkpoints, libraries, the listening socket
MOST = 4096  # connections


def most_connections() -> int:
    """Returns how many connections this process's limit of open files allows."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST if limit == resource.RLIM_INFINITY else max(min(limit - SPARE, MOST), 8)


def connection_class(most: int, seconds: float) -> type[H11Protocol]:
    """Returns uvicorn's protocol with a deadline: a request must be whole within `seconds` of the
    connection, or of the answer before it. Beyond `most` connections the one that has been silent
    longest makes room for a new one; where none is, the new one gets a 503.
    """

    class Connection(H11Protocol):
        connected: dict["Connection", None] = {}  # oldest first

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connected) >= most:
                silent = next((one for one in self.connected if one.is_silent()), None)
                if silent is None:
                    self.refuse(Refused(503, "too many connections; try again"))
                    return
                silent.cut()
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

        def is_silent(self) -> bool:
            """Says whether no request is whole that waits for its answer."""
            cycle = self.cycle
            return cycle is None or cycle.response_complete or cycle.more_body

        def expire(self) -> None:
            if self.is_silent():
                self.cut()

        def cut(self) -> None:
            self.forget()
            self.transport.abort()

        def forget(self) -> None:
            if self in self.connected:
                del self.connected[self]
                self.timer.cancel()

        def send_400_response(self, msg: str) -> None:
            self.refuse(Refused(400, msg.rstrip(".")))

        def refuse(self, e: Refused) -> None:
            body = json.dumps(e.body()).encode()
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                head = f"HTTP/1.1 {e.status} -\r\nContent-Type: application/json\r\n"
                head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                self.transport.write(head.encode() + body)
            self.transport.close()

    return Connection


class Server(uvicorn.Server):
    """uvicorn's server; `ended_by` is the signal that ended it, 0 before. `close` is called with
    the first of them, beside uvicorn's own shutdown, which waits for its answers."""

    def __init__(self, config: uvicorn.Config, close: Callable, alive: Callable[[], bool]):
        super().__init__(config)
        self.close, self.alive, self.ended_by = close, alive, 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises a signal again at its end, which asyncio may take for itself."""

        def end(number, frame) -> None:
            self.ended_by = self.ended_by or number
            self.handle_exit(number, frame)

        before = {n: signal.signal(n, end) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or not self.alive()

    async def shutdown(self, sockets=None) -> None:
        closing = asyncio.create_task(asyncio.to_thread(self.close))
        await super().shutdown(sockets)
        await closing
