"""What only a GPU shows, in one command of less than ten minutes on one GPU:

    python tests/benchmarks/gpu.py [--nanogpt=CHECKOUT] [--part=NAME,...] [--minutes=9.5]

Parts, each in a process of its own, the cheap ones first:

  parity   cuDNN's attention against the reference in float32, value and gradients
  tiny     configs/tiny.py from start to end
  plan     what `plan --topology=h200` expects of the two runs that follow (extra [plan-gpu])
  124m     GPT-2 124M in bfloat16: step, MFU, memory, where the time goes, decoding
  nanogpt  nanoGPT's own step on the same shapes: bfloat16, torch.compile, flash attention, fused
           AdamW (a checkout, and torch with CUDA)
  xl       GPT-2 1.5B in bfloat16
  decode   124M and 1.5B, one row

Prints a line for each part as it ends, and all figures as JSON last. A part that fails, or for
which no time is left, says so; the others go on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Sequences a step: what fills an 80 GB GPU without remat
RUNS = {"124m": ("small", 32, "none"), "xl": ("xl", 8, "dots")}
SHAPES = {"124m": (12, 12, 768, 32), "xl": (48, 25, 1600, 8)}  # layers, heads, width, batch
STEPS = 20


def flags_of(run: str) -> list[str]:
    """Returns the flags of a training run of `RUNS`."""
    config, batch, remat = RUNS[run]
    return [
        f"--config=configs/{config}.py",
        f"--config.batch_size={batch}",
        "--config.grad_accum=1",
        f"--config.compute.remat={remat}",
        "--config.model.vocab_size=50304",
        "--config.data.tokenizer=byte",  # nothing to train: the model's vocabulary is given
    ]


def command(name: str, *flags: str, timeout: float) -> str:
    """Returns what `python -m jaxgpt.NAME` prints on stdout."""
    argv = [sys.executable, "-m", f"jaxgpt.{name}", *flags]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}")
    return done.stdout


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def parity(timeout: float) -> dict:
    """Returns the largest error of cuDNN's attention on bfloat16 inputs, and of XLA's, each as a
    share of the largest value that the float32 reference has, over the output and the gradients."""
    import jax
    import jax.numpy as jnp

    from jaxgpt.ops.attention import xla_attention
    from jaxgpt.ops.kernels import cudnn_attention
    from jaxgpt.ops.mask import AttentionMask, Reach

    B, T, N, H = 2, 512, 8, 64
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    packed = jnp.stack([jnp.arange(T) // 100, jnp.arange(T) // 171])
    causal = AttentionMask(positions, positions)
    cases = {
        "causal": (N, causal),
        "grouped heads": (2, causal),
        "window": (N, causal.within(128)),
        "packed": (N, causal._replace(q_segments=packed, kv_segments=packed)),
        "packed, window, grouped": (
            2,
            causal._replace(q_segments=packed, kv_segments=packed).within(64),
        ),
        "both sides": (N, causal._replace(reach=Reach(causal=False))),
    }

    def with_gradients(kernel, mask):
        def run(q, k, v, grad_y):
            y, vjp = jax.vjp(lambda q, k, v: kernel(q, k, v, mask, scale=H**-0.5), q, k, v)
            return y, *vjp(grad_y)

        return jax.jit(run)

    figures = {}
    for name, (heads, mask) in cases.items():
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(B, T, N, H), (B, T, heads, H), (B, T, heads, H), (B, T, N, H)]
        arrays = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes)]
        with jax.default_matmul_precision("highest"):
            exact = with_gradients(xla_attention, mask)(*(a.astype(jnp.float32) for a in arrays))

        def error(results, exact=exact) -> float:
            return max(
                float(jnp.abs(a.astype(jnp.float32) - e).max() / jnp.abs(e).max())
                for a, e in zip(results, exact)
            )

        figures[name] = {
            "cudnn": error(with_gradients(cudnn_attention, mask)(*arrays)),
            "xla": error(with_gradients(xla_attention, mask)(*arrays)),
        }
        figures[name]["ok"] = figures[name]["cudnn"] < 2 * figures[name]["xla"] + 1e-3
    return figures


def tiny(timeout: float) -> dict:
    """Returns the seconds from start to end, and the bits per byte, of the quickstart."""
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        command("train", "--config=tiny", f"--workdir={scratch}/tiny", timeout=timeout)
        seconds = time.perf_counter() - began
        rows = [json.loads(r) for r in Path(scratch, "tiny/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "validation"][-1]
    return {
        "seconds": seconds,
        "training_seconds": last["seconds"],
        "bits_per_byte": last["bits_per_byte"],
    }


def plan(timeout: float) -> dict:
    """Returns the bytes that `plan` expects of each run."""
    figures = {}
    for run in RUNS:
        text = command("plan", *flags_of(run), "--topology=h200", timeout=timeout / len(RUNS))
        figures[run] = last_json(text)["bytes_per_device"]
    return figures


def train(run: str, timeout: float) -> dict:
    """Returns the figures of `jaxgpt.benchmark`."""
    flags = [*flags_of(run), f"--steps={STEPS}"]
    return last_json(command("benchmark", *flags, timeout=timeout))


def decode(timeout: float) -> dict:
    """Returns the tokens per second of one row."""
    figures = {}
    for run in RUNS:
        flags = [*flags_of(run), "--config.batch_size=1", "--steps=1", "--decode"]
        text = command("benchmark", *flags, timeout=timeout / len(RUNS))
        figures[run] = last_json(text)["decode_tokens_per_second"]
    return figures


def nanogpt(checkout: str) -> dict:
    """Returns tokens per second and peak bytes of nanoGPT's step, by run."""
    sys.path.insert(0, checkout)
    return {run: torch_step(*shape) for run, shape in SHAPES.items()}


def torch_step(layers: int, heads: int, width: int, batch: int) -> dict:
    import torch
    from model import GPT, GPTConfig

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = GPT(GPTConfig(1024, 50304, layers, heads, width, 0.0, True)).cuda()
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")
    compiled = torch.compile(model)
    ids = torch.randint(0, 50304, (batch, 1025), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = compiled(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / STEPS
    return {
        "step_seconds": seconds,
        "tokens_per_second": batch * 1024 / seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }


def in_child(part: str, checkout: str, timeout: float) -> dict:
    """Returns the figures of a part that holds the GPU itself, run in a process that then ends."""
    argv = [sys.executable, __file__, f"--run={part}", f"--nanogpt={checkout}"]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{part} ended with {done.returncode}")
    return last_json(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", default="")
    parser.add_argument("--part", default="")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        own = {"parity": lambda: parity(0), "nanogpt": lambda: nanogpt(args.nanogpt)}
        print(json.dumps(own[args.run]()))
        return
    until = time.perf_counter() + 60 * args.minutes
    parts = {
        "parity": lambda left: in_child("parity", "", left),
        "tiny": tiny,
        "124m": lambda left: train("124m", left),
        "nanogpt": lambda left: in_child("nanogpt", args.nanogpt, left),
        "xl": lambda left: train("xl", left),
        "decode": decode,
        "plan": plan,
    }
    if not args.nanogpt:
        del parts["nanogpt"]
    chosen = args.part.split(",") if args.part else list(parts)
    figures = {}
    for name in chosen:
        left = until - time.perf_counter()
        try:
            if left < 10:
                raise RuntimeError("no time is left")
            figures[name] = parts[name](left)
        except (RuntimeError, subprocess.TimeoutExpired, OSError, ValueError) as e:
            figures[name] = {"failed": str(e)[:200]}
        print(f"{name:<8} {json.dumps(figures[name])}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
