"""SIGTERM and SIGINT to a process that trains together with others, and its abort by JAX.

Python runs a signal's handler in the main thread between two bytecodes. While that thread waits in
C++ for the other processes, or compiles, no handler runs; and an orderly end of the interpreter
would wait at JAX's shutdown barrier, where JAX aborts the process if another one has gone. So a
signal ends the process at once, by `os._exit`, except where something else handles it, as
`StopRequest` does in the training loop.

Python's C handler also writes each signal's number to a socket, even while the process aborts. A
small process of its own reads them: it prints the line that explains an abort, and sends the other
numbers back, to a thread of this process.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

STOPS = (signal.SIGTERM, signal.SIGINT)
# Seconds by which process 0 outlives the others: when its coordinator goes, JAX aborts those that
# are still there.
MOMENT = 2.0

index: int | None = None  # of this process; None: it is alone


def watch(process: int, abort_line: str) -> None:
    """Has signals end this process at once; call it in the main thread, before JAX is started.

    `process` is its index; `abort_line` is printed as an error if JAX aborts it, with a stack trace
    and nothing that could be caught.
    """
    global index
    index = process
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        _attend(theirs, abort_line)
    theirs.close()
    ours.setblocking(False)
    signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    signal.signal(signal.SIGABRT, lambda number, frame: None)  # without one nothing is written
    for number in STOPS:
        signal.signal(number, leave)
    threading.Thread(target=_obey, args=(ours,), daemon=True).start()


def leave(number: int, frame=None) -> None:
    """Ends the process with 128 + `number`, process 0 a moment after the others."""
    if index == 0:
        time.sleep(MOMENT)
    os._exit(128 + number)


@contextlib.contextmanager
def handled_by(handler: Callable) -> Iterator[None]:
    """Has `handler(number, frame)` handle SIGTERM and SIGINT inside the `with` block."""
    previous = {number: signal.signal(number, handler) for number in STOPS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _attend(theirs: socket.socket, abort_line: str) -> None:
    """The small process: ends when the process that it attends to does."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # it has gone in between
        while byte := theirs.recv(1):
            if byte[0] == signal.SIGABRT:
                print(f"error: {abort_line}", file=sys.stderr, flush=True)
            else:
                theirs.send(byte)
    os._exit(0)


def _obey(ours: socket.socket) -> None:
    """The thread: leaves at a signal that `leave` handles, and at the second one of any kind."""
    received = 0
    while True:
        select.select([ours], [], [])
        for number in ours.recv(64):
            received += 1
            if received > 1 or signal.getsignal(number) is leave:
                leave(number)
