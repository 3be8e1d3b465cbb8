"""Steady-state training step against torch and transformers, taking turns in one run.

    python tests/benchmarks/train_step.py [tiny|small|w1] [batch] [bfloat16]      (extra [parity])

Prints tokens/s of both and their ratio, medians over the turns. Same shape, float32 or bfloat16
(torch under autocast, our `compute.dtype`), AdamW, clipping; torch runs as nanoGPT does on a CPU:
sdpa attention, no torch.compile.
"""

import statistics
import sys
import time

import jax
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from jaxgpt.config import ComputeConfig, Config, MeshConfig, ModelConfig
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.training.setup import make_training

SHAPES = {
    "tiny": dict(vocab_size=4096, max_seq_len=256, num_layers=4, num_heads=4, embed_dim=128),
    "small": dict(vocab_size=50257, max_seq_len=1024, num_layers=12, num_heads=12, embed_dim=768),
    "w1": dict(vocab_size=65, max_seq_len=256, num_layers=6, num_heads=6, embed_dim=384),
}
TURNS, STEPS = 5, 4


def jax_turn(shape: dict, batch: int, dtype: str):
    """Returns a function that takes STEPS steps and waits for them."""
    model = ModelConfig(**shape).with_sizes()
    compute = ComputeConfig(dtype=dtype, scan_layers="false")
    config = Config(batch_size=batch, model=model, compute=compute, mesh=MeshConfig(1, 1, 1))
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        training = make_training(config, mesh)
        state, step = jax.jit(training.init)(), training.compile_step()
    ids = np.random.randint(0, shape["vocab_size"], (1, batch, shape["max_seq_len"] + 1), np.int32)
    batch = {"inputs": ids[..., :-1], "targets": ids[..., 1:]}
    batch = {n: jax.device_put(a, training.batch_sharding) for n, a in batch.items()}

    def turn():
        nonlocal state
        for _ in range(STEPS):
            state, metrics = step(state, batch)
        metrics["loss"].block_until_ready()

    return turn


def torch_turn(shape: dict, batch: int, dtype: str):
    """Returns a function that takes STEPS steps."""
    config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=shape["max_seq_len"],
        n_layer=shape["num_layers"],
        n_head=shape["num_heads"],
        n_embd=shape["embed_dim"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1)
    ids = torch.randint(0, shape["vocab_size"], (batch, shape["max_seq_len"] + 1))

    def turn():
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(ids[:, :-1]).logits.flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return turn


def main() -> None:
    name, batch, dtype = (*sys.argv[1:], *("tiny", "8", "float32")[len(sys.argv) - 1 :])
    batch, shape = int(batch), SHAPES[name]
    turns = {"jaxgpt": jax_turn(shape, batch, dtype), "torch": torch_turn(shape, batch, dtype)}
    for turn in turns.values():
        turn()  # warm-up
    seconds = {who: [] for who in turns}
    for _ in range(TURNS):
        for who, turn in turns.items():
            began = time.perf_counter()
            turn()
            seconds[who].append(time.perf_counter() - began)
    tokens = STEPS * batch * shape["max_seq_len"]
    speed = {who: tokens / statistics.median(found) for who, found in seconds.items()}
    print(
        f"{name}, batch {batch}, {dtype}: jaxgpt {speed['jaxgpt']:,.0f} tok/s,"
        f" torch {torch.__version__} {speed['torch']:,.0f} tok/s,"
        f" ratio {speed['jaxgpt'] / speed['torch']:.2f}"
    )


if __name__ == "__main__":
    main()
