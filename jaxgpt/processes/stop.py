"""SIGTERM and SIGINT end training at the next step boundary."""

import signal

from jaxgpt.processes.hosts import is_peer_lost
from jaxgpt.processes.signals import STOPS, leave


class StopRequest:
    """While entered, remembers the first stop signal; a second one ends the process at once."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "StopRequest":
        self.previous = {s: signal.signal(s, self._remember) for s in STOPS}
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.received and error is not None and is_peer_lost(error):
            signal.raise_signal(self.received)  # another process was told too, and left at once

    def _remember(self, number, frame) -> None:
        if self.received:
            leave(number)  # an orderly end would wait for the save under way
        self.received = number
