"""A normal client beside a hostile one of each kind: python tests/benchmarks/hostile_serving.py

Serves a tiny model from a process that may open 256 files. For each kind of hostile client, turns
are taken: a part of the normal client's requests alone, then some beside the hostile one, which
goes on as fast as it can in a process of its own. Prints the 95th percentile of the normal
client's seconds for both, by kind, and at the end whether SIGTERM in the middle of all that ended
the server with 143. --requests=10000 are shared among the kinds. Needs the extra [serve].
"""

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.serving import CONFIG

TEXT = Path(__file__).parents[2] / "LICENSE"
ROUNDS = 5
NORMAL = json.dumps({"prompt": "def main(", "max_tokens": 16, "seed": 1}).encode()
JSON = {"Content-Type": "application/json"}
HALF = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le"


def body(**fields) -> bytes:
    """Returns a body of JSON."""
    return json.dumps({"prompt": "x"} | fields).encode()


BODIES = {
    "stop of 900,000 characters": (body(stop="a" * 900_000, max_tokens=100), JSON),
    "deep JSON": (b"[" * 100_000, JSON),
    "prompt of 1,000,000 characters": (body(prompt="a" * 1_000_000), JSON),
    "body over the limit": (b" " * (1 << 21), JSON),
    "numbers of 400 digits": (body(temperature=10**400), JSON),
    "text/plain from a page": (body(), {"Content-Type": "text/plain", "Origin": "http://evil"}),
    "16 choices of 100 tokens": (body(n=16, max_tokens=100), JSON),
}


def send(port: int, content: bytes, headers: dict, keep: http.client.HTTPConnection | None = None):
    """Sends a completions request; returns the answer's status."""
    connection = keep or http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/completions", content, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        if keep is None:
            connection.close()


def flood(port: int, sent, content: bytes, headers: dict) -> None:
    """Sends the same request for ever, counting."""
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            send(port, content, headers)
        sent.value += 1


def hold(port: int, sent, start: bytes) -> None:
    """Keeps 320 connections open that have sent so much, and opens those again that are cut."""
    held: list[socket.socket] = []
    while True:
        for one in list(held):
            with contextlib.suppress(BlockingIOError):
                try:
                    if one.recv(1):
                        continue
                except ConnectionError:
                    pass
                held.remove(one)
                one.close()
        while len(held) < 320:
            with contextlib.suppress(OSError):
                held.append(socket.create_connection(("127.0.0.1", port)))
                held[-1].sendall(start)
                sent.value += 1
                held[-1].setblocking(False)
        time.sleep(0.05)


def leave(port: int, sent) -> None:
    """Asks for streams and goes after their first bytes."""
    content = body(stream=True, max_tokens=100)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as one:
            one.sendall(head + b"Content-Length: %d\r\n\r\n%s" % (len(content), content))
            one.recv(10)
        sent.value += 1


KINDS = {name: (flood, *args) for name, args in BODIES.items()} | {
    "320 half-sent requests": (hold, HALF),
    "320 silent connections": (hold, b""),
    "streams that are left": (leave,),
}


def timed(port: int, count: int) -> list[float]:
    """Returns the seconds of so many normal requests, one after the other on new connections."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        status = send(port, NORMAL, JSON)
        assert status == 200, status
        found.append(time.perf_counter() - began)
    return found


def p95(seconds: list[float]) -> float:
    """Returns the 95th percentile in milliseconds."""
    return round(1000 * statistics.quantiles(seconds, n=20)[-1], 1)


def few_files() -> None:
    """Lowers the limit of open files of this process."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


def main(requests: int, only: str) -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    kinds = {name: act for name, act in KINDS.items() if only in name}
    python, each = [sys.executable, "-m"], requests // len(kinds)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "c.py").write_text(CONFIG)
        train = ["jaxgpt.train", f"--config={folder}/c.py", f"--workdir={folder}/run"]
        train.append(f"--config.data.source=text:{TEXT}")
        subprocess.run([*python, *train], env=env, check=True, capture_output=True)
        server = subprocess.Popen(
            [*python, "jaxgpt.serve", f"--workdir={folder}/run", "--port=0"],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=few_files,
        )
        line = next(line for line in server.stderr if line.startswith("serving "))
        port = int(line.split("://")[1].split("/")[0].split(":")[1])
        timed(port, 20)
        for name, (act, *args) in kinds.items():
            sent = multiprocessing.Value("l", 0)
            hostile = multiprocessing.Process(target=act, args=(port, sent, *args), daemon=True)
            hostile.start()
            alone, beside = [], []
            for _ in range(ROUNDS):
                os.kill(hostile.pid, signal.SIGSTOP)
                time.sleep(1)  # its last request ends
                alone += timed(port, each // 4 // ROUNDS)
                os.kill(hostile.pid, signal.SIGCONT)
                time.sleep(0.5)
                beside += timed(port, each * 3 // 4 // ROUNDS)
            if name != list(kinds)[-1]:
                hostile.terminate()
                hostile.join()
                time.sleep(1)
            found = {
                "kind": name,
                "normal": len(alone + beside),
                "hostile": sent.value,
                "alone_p95_ms": p95(alone),
                "beside_p95_ms": p95(beside),
            }
            found["ratio"] = round(found["beside_p95_ms"] / found["alone_p95_ms"], 2)
            print(json.dumps(found), flush=True)
        server.terminate()  # under load
        print(json.dumps({"exit_code": server.wait(timeout=60), "stderr": server.stderr.read()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--only", default="", help="kinds with this in their name")
    given = parser.parse_args()
    main(given.requests, given.only)
