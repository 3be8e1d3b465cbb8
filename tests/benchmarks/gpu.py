"""What only a GPU shows, in one command of less than ten minutes on one GPU:

    python tests/benchmarks/gpu.py [--nanogpt=CHECKOUT] [--part=NAME,...] [--minutes=9.5] [--small]

Parts, each in a process of its own, in this order:

  parity      cuDNN's attention against the reference in float32, value and gradients
  tiny        configs/tiny.py from start to end
  124m, xl    GPT-2 124M and 1.5B in bfloat16: step, MFU, memory, where the time goes
  plan        what `plan --topology=h200` expected of these two runs (extra [plan-gpu])
  nanogpt     nanoGPT's own step on the shapes of 124m: bfloat16, torch.compile, flash attention,
              fused AdamW (a checkout, and torch with CUDA)
  profile     the kernels that take longest in the slower of 124m and xl, by MFU
  decode      124M and 1.5B, one row
  nanogpt-xl  nanoGPT's step on the shapes of xl

Prints a line for each part as it ends, and all figures as JSON last, with ratios to nanoGPT and
to `plan`. A part that fails, or for which no time is left, says so; the others go on. `--small`
takes tiny shapes, to see on any machine that every part runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Sequences a step: what fills an 80 GB GPU without remat
RUNS = {"124m": ("small", 32, "none"), "xl": ("xl", 8, "dots")}
SHAPES = {"124m": (12, 12, 768, 32), "xl": (48, 25, 1600, 8)}  # layers, heads, width, batch
STEPS, LENGTH = 20, 1024
# A profile attributes kernels to the program's instructions only outside of CUDA graphs
WITHOUT_GRAPHS = "--xla_gpu_enable_command_buffer="
SMALL = [
    *("--config.model.num_layers=2", "--config.model.num_heads=2", "--config.model.embed_dim=64"),
    *("--config.model.mlp_dim=256", "--config.model.max_seq_len=64", "--config.batch_size=4"),
]


def flags_of(run: str, small: bool) -> list[str]:
    """Returns the flags of a training run of `RUNS`."""
    config, batch, remat = RUNS[run]
    return [
        f"--config=configs/{config}.py",
        f"--config.batch_size={batch}",
        "--config.grad_accum=1",
        f"--config.compute.remat={remat}",
        "--config.model.vocab_size=50304",
        "--config.data.tokenizer=byte",  # nothing to train: the model's vocabulary is given
        *(SMALL if small else ()),
    ]


def command(name: str, *flags: str, timeout: float, xla_flags: str = "") -> str:
    """Returns what `python -m jaxgpt.NAME` prints on stdout."""
    argv = [sys.executable, "-m", f"jaxgpt.{name}", *flags]
    env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()}
    done = subprocess.run(
        argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=timeout, env=env
    )
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}")
    return done.stdout


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def parity() -> dict:
    """Returns the largest error of cuDNN's attention on bfloat16 inputs, and of XLA's, each as a
    share of the largest value that the float32 reference has, over the output and the gradients.
    Without a GPU, where cuDNN is not, XLA's stands for it."""
    import jax
    import jax.numpy as jnp

    from jaxgpt.ops.attention import xla_attention
    from jaxgpt.ops.kernels import cudnn_attention
    from jaxgpt.ops.mask import AttentionMask, Reach

    kernel = cudnn_attention if jax.default_backend() == "gpu" else xla_attention
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
            "cudnn": error(with_gradients(kernel, mask)(*arrays)),
            "xla": error(with_gradients(xla_attention, mask)(*arrays)),
        }
        figures[name]["ok"] = figures[name]["cudnn"] < 2 * figures[name]["xla"] + 1e-3
    return figures


def tiny(small: bool, timeout: float) -> dict:
    """Returns the seconds from start to end, and the bits per byte, of the quickstart."""
    shorter = ["--config.num_steps=20", *SMALL] if small else []
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        command("train", "--config=tiny", f"--workdir={scratch}/tiny", *shorter, timeout=timeout)
        seconds = time.perf_counter() - began
        rows = [json.loads(r) for r in Path(scratch, "tiny/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "validation"][-1]
    return {
        "seconds": seconds,
        "training_seconds": last["seconds"],
        "bits_per_byte": last["bits_per_byte"],
    }


def plan(small: bool, timeout: float) -> dict:
    """Returns the bytes that `plan` expects of each run."""
    figures = {}
    for run in RUNS:
        flags = [*flags_of(run, small), "--topology=h200"]
        text = command("plan", *flags, timeout=timeout / len(RUNS))
        figures[run] = last_json(text)["bytes_per_device"]
    return figures


def train(run: str, small: bool, timeout: float) -> dict:
    """Returns the figures of `jaxgpt.benchmark`."""
    flags = [*flags_of(run, small), f"--steps={STEPS}"]
    return last_json(command("benchmark", *flags, timeout=timeout))


def profile(run: str, small: bool, timeout: float) -> dict:
    """Returns where the time of a run goes, and the kernels that take the longest together: name,
    seconds and calls in the profiled steps. The profile stays, for TensorBoard and Perfetto."""
    folder = tempfile.mkdtemp(prefix="jaxgpt-profile-")
    flags = [*flags_of(run, small), "--steps=1", f"--profile={folder}"]
    text = command("benchmark", *flags, timeout=timeout, xla_flags=WITHOUT_GRAPHS)
    shares = last_json(text)["time_shares"]
    return {"run": run, "folder": folder, "time_shares": shares, "kernels": longest(folder)}


def longest(folder: str) -> list[tuple[str, float, int]]:
    from jax.profiler import ProfileData

    (file,) = Path(folder).rglob("*.xplane.pb")
    seconds, calls = Counter(), Counter()
    planes = list(ProfileData.from_file(str(file)).planes)
    for plane in [p for p in planes if p.name.startswith("/device:GPU")] or planes:
        for line in plane.lines:
            for event in line.events:
                seconds[event.name] += event.duration_ns / 1e9
                calls[event.name] += 1
    return [(name[:100], total, calls[name]) for name, total in seconds.most_common(15)]


def decode(small: bool, timeout: float) -> dict:
    """Returns the tokens per second of one row."""
    figures = {}
    for run in RUNS:
        flags = [*flags_of(run, small), "--config.batch_size=1", "--steps=1", "--decode"]
        text = command("benchmark", *flags, timeout=timeout / len(RUNS))
        figures[run] = last_json(text)["decode_tokens_per_second"]
    return figures


def nanogpt(run: str, checkout: str, small: bool) -> dict:
    """Returns the seconds a step, tokens per second and peak bytes of nanoGPT's step."""
    sys.path.insert(0, checkout)
    return torch_step(*((2, 2, 64, 4), 64) if small else (SHAPES[run], LENGTH))


def torch_step(shape: tuple[int, ...], length: int) -> dict:
    import torch
    from model import GPT, GPTConfig

    layers, heads, width, batch = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    model = GPT(GPTConfig(length, 50304, layers, heads, width, 0.0, True)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    compiled = torch.compile(model)
    ids = torch.randint(0, 50304, (batch, length + 1), device=device)

    def steps(count: int) -> None:
        for _ in range(count):
            with torch.autocast(device, torch.bfloat16):
                _, loss = compiled(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device

    steps(3)
    began = time.perf_counter()
    steps(STEPS)
    seconds = (time.perf_counter() - began) / STEPS
    return {
        "step_seconds": seconds,
        "tokens_per_second": batch * length / seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def in_child(part: str, args: argparse.Namespace, timeout: float) -> dict:
    """Returns the figures of a part that holds the GPU itself, run in a process that then ends."""
    argv = [sys.executable, __file__, f"--run={part}", f"--nanogpt={args.nanogpt}"]
    argv += ["--small"] * args.small
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{part} ended with {done.returncode}")
    return last_json(done.stdout)


def ratios(figures: dict) -> dict:
    """Returns how much of `plan`'s memory each run took, and its speed over nanoGPT's."""
    found = {}
    for run, peer in {"124m": "nanogpt", "xl": "nanogpt-xl"}.items():
        ours, planned = figures.get(run, {}), figures.get("plan", {}).get(run)
        if planned and (used := ours.get("peak_memory_bytes")):
            found[f"{run}: memory over plan's"] = used / planned["total"]
        theirs = figures.get(peer, {}).get("tokens_per_second")
        if theirs and (speed := ours.get("tokens_per_second")):
            found[f"{run}: speed over nanoGPT's"] = speed / theirs
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", default="")
    parser.add_argument("--part", default="")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    own = {
        "parity": parity,
        "nanogpt": lambda: nanogpt("124m", args.nanogpt, args.small),
        "nanogpt-xl": lambda: nanogpt("xl", args.nanogpt, args.small),
    }
    if args.run:
        print(json.dumps(own[args.run]()))
        return
    figures = {}

    def slowest() -> str:
        return min(RUNS, key=lambda run: figures.get(run, {}).get("mfu", 1.0))

    parts = {
        "parity": lambda left: in_child("parity", args, left),
        "tiny": lambda left: tiny(args.small, left),
        "124m": lambda left: train("124m", args.small, left),
        "xl": lambda left: train("xl", args.small, left),
        "plan": lambda left: plan(args.small, left),
        "nanogpt": lambda left: in_child("nanogpt", args, left),
        "profile": lambda left: profile(slowest(), args.small, left),
        "decode": lambda left: decode(args.small, left),
        "nanogpt-xl": lambda left: in_child("nanogpt-xl", args, left),
    }
    if not args.nanogpt:
        del parts["nanogpt"], parts["nanogpt-xl"]
    chosen = args.part.split(",") if args.part else list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"no such part, or --nanogpt is missing: {', '.join(sorted(unknown))}")
    until = time.perf_counter() + 60 * args.minutes
    for name in chosen:
        began = time.perf_counter()
        try:
            if until - began < 10:
                raise RuntimeError("no time is left")
            figures[name] = parts[name](until - began)
        except Exception as e:  # whatever it is: the other parts are worth their run
            figures[name] = {"failed": f"{type(e).__name__}: {e}"[:200]}
        took = time.perf_counter() - began
        print(f"{name:<10} {took:6.1f} s  {json.dumps(figures[name])}", flush=True)
    print(json.dumps(figures | {"ratios": ratios(figures)}))


if __name__ == "__main__":
    main()
