"""How fast and how large preparing is, and how fast the loader: against the bare tokenizer.

    python tests/benchmarks/data.py prepare [--megabytes=2000] [--tokenizer=sentencepiece:8192]
    python tests/benchmarks/data.py loader

`prepare` writes one text file of that size, prepares it in a process of its own and prints its
peak memory and its throughput per core, beside that of the bare tokenizer (one thread, documents
of 64 KB, ids in an array) on the same text, measured before and after. `loader` prints the tokens
per second of batches on the host and on the devices, T 1024, plain and packed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxgpt.config import Config, DataConfig, ModelConfig
from jaxgpt.data.prepare import prepare
from jaxgpt.text.formats import read_builtin
from jaxgpt.tokenizer import load_tokenizer

CHILD = """
import resource, sys, time
from jaxgpt.config import DataConfig
from jaxgpt.data.prepare import prepare
began = time.perf_counter()
data = prepare(DataConfig(source=sys.argv[1], tokenizer=sys.argv[2]), sys.argv[3])
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def bare(tokenizer, text: str) -> float:
    """Returns bytes per second of `encode` on one core."""
    parts = [text[i : i + 65536] for i in range(0, len(text), 65536)]
    began = time.perf_counter()
    for part in parts:
        np.asarray(tokenizer.encode(part), np.uint16)
    return len(text.encode()) / (time.perf_counter() - began)


def measure_prepare(megabytes: int, spec: str) -> dict:
    text = "".join(piece.text for piece in read_builtin())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAXGPT_CACHE"] = f"{folder}/cache"
        file, size = Path(folder) / "corpus.txt", 0
        with open(file, "w") as out:
            while size < megabytes * 10**6:
                size += len(text.encode())
                out.write(text)
        run = [sys.executable, "-c", CHILD, f"text:{file}", spec, f"{folder}/out"]
        done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
        seconds, peak = map(float, done.stdout.split())
        tokenizer = load_tokenizer(Path(folder) / "out/tokenizer")
        alone = max(bare(tokenizer, text) for _ in range(3))
    per_core = size / seconds / os.cpu_count()
    return {
        "tokenizer": spec,
        "gigabytes": size / 1e9,
        "seconds": seconds,
        "peak_mib": peak,
        "prepare_mb_per_second_per_core": per_core / 1e6,
        "bare_mb_per_second": alone / 1e6,
        "ratio": per_core / alone,
    }


def measure_loader() -> dict:
    import jax
    from jax.sharding import NamedSharding

    from jaxgpt.data.pipeline import device_batches, training_stream
    from jaxgpt.parallel.mesh import make_mesh, rules_of

    found = {}
    for pack in (False, True):
        config = Config(
            model=ModelConfig(max_seq_len=1024),
            batch_size=64,
            data=DataConfig(tokenizer="sentencepiece:8192", pack=pack),
        )
        stream = training_stream(prepare(config.data).train, config)
        name = "packed" if pack else "windows"
        count, per_batch = 300, 64 * 1024
        began = time.perf_counter()
        for k in range(count):
            stream.batch(k)
        found[f"{name}_host"] = count * per_batch / (time.perf_counter() - began) / 1e6
        with jax.set_mesh(mesh := make_mesh(config)):
            sharding = NamedSharding(mesh, rules_of(mesh)(None, "batch", "seq"))
            batches = device_batches(stream, sharding, 0, count + 1)
            jax.block_until_ready(next(batches))
            began = time.perf_counter()
            for batch in batches:
                jax.block_until_ready(batch)
            found[f"{name}_device"] = count * per_batch / (time.perf_counter() - began) / 1e6
    return {f"{name}_million_tokens_per_second": rate for name, rate in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("prepare", "loader"))
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--tokenizer", default="sentencepiece:8192")
    args = parser.parse_args()
    if args.what == "prepare":
        print(json.dumps(measure_prepare(args.megabytes, args.tokenizer)))
    else:
        print(json.dumps(measure_loader()))
