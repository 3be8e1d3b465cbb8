"""Decoding speed beside transformers': python tests/benchmarks/decode.py [--new=200] [--rounds=3]

GPT-2 124M's shape with random weights, the same in both, float32, top-k 200 at temperature 0.8, the
two taking turns in one process each; the best round of each counts, compilation apart. Needs torch
and transformers (the extra [parity]). Prints JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time

PROMPT = 16  # tokens


def ours(batch: int, new: int):
    import jax
    import numpy as np

    from jaxgpt.config import Config, presets
    from jaxgpt.inference.decode import Decoder, generate
    from jaxgpt.inference.requests import Sampling
    from jaxgpt.model import ModelSpec
    from jaxgpt.parallel.mesh import make_mesh

    cfg = presets.gpt2(
        num_layers=12, num_heads=12, embed_dim=768, vocab_size=50257, max_seq_len=1024
    )
    config = Config(model=cfg.with_sizes())
    spec = ModelSpec(config, "xla")
    jax.set_mesh(make_mesh(config, jax.devices()[:1]))
    decoder = Decoder.of(spec, jax.jit(spec.init)(jax.random.key(0)), spec.model.vocab_size)
    prompts = [np.arange(PROMPT, dtype=np.int32) + b for b in range(batch)]
    return lambda: generate(decoder, prompts, new, Sampling(0.8, 200))


def theirs(batch: int, new: int):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).eval()
    prompts = torch.arange(PROMPT)[None] + torch.arange(batch)[:, None]
    mask = torch.ones_like(prompts)

    def run():
        with torch.inference_mode():
            model.generate(
                prompts,
                attention_mask=mask,
                do_sample=True,
                temperature=0.8,
                top_k=200,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )

    return run


def child(side: str, batch: int, new: int) -> None:
    """Runs once to warm up, then once for each line on stdin; prints the seconds."""
    run = {"ours": ours, "theirs": theirs}[side](batch, new)
    began = time.perf_counter()
    run()
    print(time.perf_counter() - began, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        print(time.perf_counter() - began, flush=True)


def compared(batch: int, new: int, rounds: int) -> dict:
    sides = ("ours", "theirs")
    processes = {
        side: subprocess.Popen(
            [sys.executable, __file__, f"--child={side}", f"--batch={batch}", f"--new={new}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
        )
        for side in sides
    }
    first = {side: float(p.stdout.readline()) for side, p in processes.items()}
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for side, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            best[side] = min(best[side], float(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return {
        "batch": batch,
        "new_tokens": new,
        "tokens_per_second": {side: batch * new / best[side] for side in sides},
        "ratio": best["theirs"] / best["ours"],
        "first_call_seconds": first["ours"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", default="")
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.batch, args.new)
    else:
        for batch in (1, 8):
            print(json.dumps(compared(batch, args.new, args.rounds)), flush=True)
