"""The reference for mixtures of experts: transformers' Mixtral and Qwen3-MoE.

`python tests/golden/mixtures_torch.py` (extra [parity]) rewrites mixtral.npz and qwen3_moe.npz.
Arrays have the names that model folders have: the tests read them through the importer.
"""

import json
import re
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
SHAPE = dict(
    vocab_size=131,
    hidden_size=20,
    intermediate_size=28,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
    rope_parameters=dict(rope_type="default", rope_theta=500.0),
    router_aux_loss_coef=0.05,
    output_router_logits=True,
)
CONFIGS = {
    "mixtral": (
        *("MixtralForCausalLM", "MixtralConfig"),
        SHAPE
        | dict(num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2)
        | dict(router_aux_loss_coef=0.0),
    ),
    # The first layer is dense
    "qwen3_moe": (
        *("Qwen3MoeForCausalLM", "Qwen3MoeConfig"),
        SHAPE
        | dict(num_hidden_layers=2, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=12)
        | dict(norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[]),
    ),
}
LENGTH, BATCH = 17, 3
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def make_model(name: str, seed: int):
    """A model of which every parameter is random."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model_class, config_class, fields = CONFIGS[name]
    config = getattr(transformers, config_class)(**fields, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter))
    return model


def as_stored(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays as a model has them, whose experts lie together, by the names of those in files."""
    found = {}
    for path, a in arrays.items():
        match = re.fullmatch(r"(.*\.mlp)\.experts\.(gate_up|down)_proj", path)
        if not match:
            stored = path.replace(".mlp.", ".block_sparse_moe.") if name == "mixtral" else path
            found[stored] = a
            continue
        module = match[1].replace(".mlp", ".block_sparse_moe") if name == "mixtral" else match[1]
        parts = {"down_proj": a}
        if match[2] == "gate_up":
            parts = dict(zip(("gate_proj", "up_proj"), np.split(a, 2, axis=1)))
        for part, of_all in parts.items():
            part = MIXTRAL[part] if name == "mixtral" else part
            found |= {f"{module}.experts.{e}.{part}.weight": w for e, w in enumerate(of_all)}
    return found


def reference(name: str, seed: int) -> dict[str, np.ndarray]:
    """The config, weights, tokens, their logits, the loss, the balance loss and the gradients of
    the loss with the balance loss in it."""
    import torch

    model, vocab = make_model(name, seed), SHAPE["vocab_size"]
    tokens = torch.randint(0, vocab, (BATCH, LENGTH + 1))
    out = model(tokens[:, :-1])
    targets = tokens[:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(out.logits.reshape(-1, vocab), targets)
    (loss + model.config.router_aux_loss_coef * out.aux_loss).backward()
    found = {"config": np.array(json.dumps(model.config.to_dict()))}
    found |= {"tokens": tokens.numpy().astype(np.int32), "logits": out.logits.detach().numpy()}
    found |= {"loss": loss.detach().numpy(), "balance_loss": out.aux_loss.detach().numpy()}
    named = dict(model.named_parameters())
    weights = as_stored(name, {path: p.detach().numpy().copy() for path, p in named.items()})
    grads = as_stored(name, {path: p.grad.numpy().copy() for path, p in named.items()})
    found |= {f"weight/{path}": a for path, a in weights.items()}
    return found | {f"grad/{path}": a for path, a in grads.items()}


if __name__ == "__main__":
    for name in CONFIGS:
        np.savez_compressed(FOLDER / f"{name}.npz", **reference(name, 0))
        print(f"wrote {name}.npz")
