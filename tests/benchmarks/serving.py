"""A server under many requests: python tests/benchmarks/serving.py [--requests=2000] [--clients=64]

Trains a tiny model, serves it, and sends completions of all kinds (streamed, cancelled half-way,
refused) from `clients` threads. Prints requests/s and the server's resident memory on the way, in
MiB: flat is what it should be after the first few hundred. Needs the extra [serve].
"""

import argparse
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=2, batch_size=8, eval_every=0, eval_batches=1,
        model=ModelConfig(max_seq_len=128, num_layers=2, num_heads=2, embed_dim=32),
        data=DataConfig(tokenizer="byte"), sample=SampleConfig(max_new_tokens=1),
    )
"""


def memory(pid: int) -> float:
    """Resident memory in MiB (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def ask(port: int, number: int) -> int:
    """Sends request `number`, of one kind in eight; returns the answer's status."""
    chance = random.Random(number)
    body = {
        "prompt": "x" * chance.randint(1, 60),
        "max_tokens": chance.randint(1, 60),
        "seed": number,
    }
    kind = number % 8
    if kind == 0:
        body["max_tokens"] = 10**6  # refused
    if kind in (1, 2):
        body["stream"] = True
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if kind == 2:
            answer.read(10)  # and goes
        else:
            answer.read()
        return answer.status
    finally:
        connection.close()


def main(requests: int, clients: int) -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "c.py").write_text(CONFIG)
        argv = [
            sys.executable,
            "-m",
            "jaxgpt.train",
            f"--config={folder}/c.py",
            f"--workdir={folder}/run",
        ]
        subprocess.run(argv, env=env, check=True, capture_output=True)
        server = subprocess.Popen(
            [sys.executable, "-m", "jaxgpt.serve", f"--workdir={folder}/run", "--port=0"],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = next(line for line in server.stderr if line.startswith("serving "))
        port = int(line.split("://")[1].split("/")[0].split(":")[1])
        numbers, lock, codes, readings = iter(range(requests)), threading.Lock(), {}, []

        def work() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                    if number is None:
                        return
                    if number % max(requests // 10, 1) == 0:
                        readings.append((number, round(memory(server.pid), 1)))
                status = ask(port, number)
                with lock:
                    codes[status] = codes.get(status, 0) + 1

        began = time.monotonic()
        threads = [threading.Thread(target=work) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        readings.append((requests, round(memory(server.pid), 1)))
        server.terminate()
        server.wait()
        print(
            json.dumps(
                {
                    "requests": requests,
                    "clients": clients,
                    "requests_per_second": requests / seconds,
                    "statuses": codes,
                    "memory_mib": readings,
                    "exit_code": server.returncode,
                }
            )
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    args = parser.parse_args()
    main(args.requests, args.clients)
