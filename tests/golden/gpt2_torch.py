"""The reference: transformers' GPT-2 and torch's AdamW, and the weights in our layout.

`python tests/golden/gpt2_torch.py` (extra [parity]) rewrites gpt2.npz.
"""

import math
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("gpt2.npz")
ODD = dict(vocab_size=203, n_positions=23, n_embd=30, n_layer=3, n_head=5)  # nothing a power of 2
STEPS, BATCH, WARMUP, PEAK, FLOOR = 20, 4, 5, 1e-2, 0.1
ADAMW = dict(betas=(0.9, 0.95), eps=1e-8)
DECAY, CLIP = 0.1, 1.0


def learning_rate(step: int) -> float:
    """Linear warm-up, then cosine to FLOOR * PEAK at the last step; steps count from 1."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return PEAK * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_model(seed: int, shape: dict):
    """A GPT-2 with every parameter random: biases and norms too, which GPT-2 starts at 0 and 1."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    none = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(GPT2Config(**shape, **none, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def reference(seed: int, shape: dict, train: bool = True) -> dict[str, np.ndarray]:
    """Weights, tokens, logits, loss, gradients and (train) the losses of STEPS AdamW steps."""
    import torch

    model = make_model(seed, shape)
    vocab, length = shape["vocab_size"], shape["n_positions"]
    batches = torch.randint(0, vocab, (4, BATCH, length + 1)).repeat(STEPS // 4, 1, 1)
    found = {f"weight/{n}": p.detach().numpy().copy() for n, p in model.named_parameters()}
    found["batches"] = batches.numpy().astype(np.int32)

    def loss_on(tokens):
        logits = model(tokens[:, :-1]).logits
        return logits, torch.nn.functional.cross_entropy(
            logits.reshape(-1, vocab), tokens[:, 1:].reshape(-1)
        )

    logits, loss = loss_on(batches[0])
    loss.backward()
    found["logits"], found["loss"] = logits.detach().numpy(), loss.detach().numpy()
    found |= {f"grad/{n}": p.grad.numpy().copy() for n, p in model.named_parameters()}
    if train:
        found["losses"] = np.array(train_losses(model, batches, loss_on))
    return found


def train_losses(model, batches, loss_on) -> list[float]:
    """The loss of each step before its update."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=DECAY), dict(params=vectors, weight_decay=0.0)]
    optimizer, losses = torch.optim.AdamW(groups, lr=PEAK, **ADAMW), []
    for step, tokens in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad()
        _, loss = loss_on(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_layout(named: dict[str, np.ndarray], shape: dict, padded_vocab: int) -> dict:
    """Transformers' parameters (or their gradients) as jaxgpt's nested dict."""
    layers, heads, dim = shape["n_layer"], shape["n_head"], shape["n_embd"]

    def stacked(name, *form):
        arrays = [named[f"transformer.h.{i}.{name}"] for i in range(layers)]
        return np.stack(arrays).reshape(layers, *form) if form else np.stack(arrays)

    qkv = stacked("attn.c_attn.weight", dim, 3, heads, -1)
    qkv_bias = stacked("attn.c_attn.bias", 3, heads, -1)
    out = stacked("attn.c_proj.weight", heads, -1, dim)
    attention = {"out": {"kernel": out, "bias": stacked("attn.c_proj.bias")}}
    for i, name in enumerate(("query", "key", "value")):
        attention[name] = {"kernel": qkv[:, :, i], "bias": qkv_bias[:, i]}
    tokens = named["transformer.wte.weight"]
    return {
        "tokens": np.pad(tokens, ((0, padded_vocab - len(tokens)), (0, 0))),
        "positions": {"kernel": named["transformer.wpe.weight"]},
        "blocks": {
            "attention_norm": {"scale": stacked("ln_1.weight"), "bias": stacked("ln_1.bias")},
            "attention": attention,
            "mlp_norm": {"scale": stacked("ln_2.weight"), "bias": stacked("ln_2.bias")},
            "mlp": {
                "up": {"kernel": stacked("mlp.c_fc.weight"), "bias": stacked("mlp.c_fc.bias")},
                "down": {
                    "kernel": stacked("mlp.c_proj.weight"),
                    "bias": stacked("mlp.c_proj.bias"),
                },
            },
        },
        "final_norm": {
            "scale": named["transformer.ln_f.weight"],
            "bias": named["transformer.ln_f.bias"],
        },
    }


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **reference(0, ODD))
    print(f"wrote {GOLDEN}")
