"""Decoding from few bits beside float32: python tests/benchmarks/quantised.py [--new=100]

GPT-2 124M's shape with random weights, float32, greedy, as floats and as int8, int4 and NF4, all
in one process; they take turns, and the best round of each counts, compilation apart. Prints a
line of JSON for each number of rows: tokens per second, and how many times float32's they are.
"""

import argparse
import dataclasses
import json
import time

import jax
import numpy as np

from jaxgpt.config import Config, presets
from jaxgpt.inference.decode import Decoder, generate
from jaxgpt.inference.requests import Sampling
from jaxgpt.model import ModelSpec
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.parameters.weights import DEFAULT_GROUP
from jaxgpt.shrinking.quantise import nearest

PROMPT = 16  # tokens


def decoders(kinds: list[str]) -> dict[str, Decoder]:
    """Returns the decoder of the same weights stored as each of `kinds`."""
    sizes = dict(num_layers=12, num_heads=12, embed_dim=768, vocab_size=50257, max_seq_len=1024)
    config = Config(model=presets.gpt2(**sizes).with_sizes())
    jax.set_mesh(make_mesh(config, jax.devices()[:1]))
    floats = jax.device_get(jax.jit(ModelSpec(config, "xla").init)(jax.random.key(0)))
    found = {}
    for kind in kinds:
        fields = dict(weights=kind, group=DEFAULT_GROUP.get(kind, 0))
        shrink = dataclasses.replace(config.shrink, **fields)
        spec = ModelSpec(dataclasses.replace(config, shrink=shrink), "xla")
        found[kind] = Decoder.of(spec, nearest(floats, shrink, "head"), spec.model.vocab_size)
    return found


def compared(found: dict[str, Decoder], batch: int, new: int, rounds: int) -> dict:
    """Returns each one's tokens per second with so many rows."""
    best = dict.fromkeys(found, float("inf"))
    prompts = [np.arange(PROMPT, dtype=np.int32) + b for b in range(batch)]
    for count in range(1 + rounds):  # the first compiles
        for kind, decoder in found.items():
            began = time.perf_counter()
            generate(decoder, prompts, new, Sampling(temperature=0.0))
            if count:
                best[kind] = min(best[kind], time.perf_counter() - began)
    speeds = {kind: round(batch * new / seconds, 1) for kind, seconds in best.items()}
    ratios = {kind: round(best["float"] / seconds, 2) for kind, seconds in best.items()}
    return {"batch": batch, "tokens_per_second": speeds, "times_float32": ratios}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--kinds", default="int8,int4,nf4")
    args = parser.parse_args()
    found = decoders(["float", *args.kinds.split(",")])
    for batch in map(int, args.batches.split(",")):
        print(json.dumps(compared(found, batch, args.new, args.rounds)), flush=True)
