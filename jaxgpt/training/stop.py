"""SIGTERM and SIGINT end training at the next step boundary."""

import signal


class StopRequest:
    """While entered, remembers the first stop signal; a second one has its usual effect at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopRequest":
        self.previous = {s: signal.signal(s, self._remember) for s in self.SIGNALS}
        return self

    def __exit__(self, *exc) -> None:
        self._restore()

    def _remember(self, number, frame) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, 0 if there was none."""
        return 128 + self.received if self.received else 0
