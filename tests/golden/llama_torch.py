"""The reference for the modern decoder: transformers' Llama and Qwen3, weights in our layout.

`python tests/golden/llama_torch.py` (extra [parity]) rewrites llama.npz and qwen3.npz.
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
SHAPE = dict(
    vocab_size=203,
    hidden_size=30,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    head_dim=10,
)
LENGTH, BATCH, THETA = 37, 3, 500.0
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=THETA,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

YARN = dict(
    rope_type="yarn",
    rope_theta=THETA,
    factor=4.0,
    beta_fast=4.0,
    beta_slow=0.5,
    original_max_position_embeddings=16,
)


def make_model(name: str, seed: int):
    """A Llama (llama3's RoPE scaling, or yarn's) or a Qwen3 (qk-norm), every parameter random."""
    import torch
    import transformers

    torch.manual_seed(seed)
    if name != "qwen3":
        rope = YARN if name == "yarn" else LLAMA3
        config = transformers.LlamaConfig(
            **SHAPE, rope_parameters=rope, attn_implementation="eager"
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        plain = dict(rope_type="default", rope_theta=THETA)
        config = transformers.Qwen3Config(
            **SHAPE, rope_parameters=plain, attn_implementation="eager"
        )
        model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def reference(name: str, seed: int) -> dict[str, np.ndarray]:
    """Weights, tokens, logits, loss and gradients."""
    import torch

    model, vocab = make_model(name, seed), SHAPE["vocab_size"]
    tokens = torch.randint(0, vocab, (BATCH, LENGTH + 1))
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, vocab), tokens[:, 1:].reshape(-1))
    loss.backward()
    found = {"tokens": tokens.numpy().astype(np.int32)}
    found |= {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    for path, parameter in model.named_parameters():
        found[f"weight/{path}"] = parameter.detach().numpy().copy()
        found[f"grad/{path}"] = parameter.grad.numpy().copy()
    return found


def our_layout(named: dict[str, np.ndarray], padded_vocab: int) -> dict:
    """Transformers' parameters (or their gradients) as jaxgpt's nested dict."""
    layers, heads = SHAPE["num_hidden_layers"], SHAPE["num_attention_heads"]
    groups, width, dim = SHAPE["num_key_value_heads"], SHAPE["head_dim"], SHAPE["hidden_size"]

    def stacked(name):
        return np.stack([named[f"model.layers.{i}.{name}.weight"] for i in range(layers)])

    def kernel(name, *form):
        turned = np.swapaxes(stacked(name), 1, 2)  # torch keeps [out, in]
        return {"kernel": turned.reshape(layers, *form) if form else turned}

    def table(name):
        rows = named[f"{name}.weight"]
        return np.pad(rows, ((0, padded_vocab - len(rows)), (0, 0)))

    attention = {
        "query": kernel("self_attn.q_proj", dim, heads, width),
        "key": kernel("self_attn.k_proj", dim, groups, width),
        "value": kernel("self_attn.v_proj", dim, groups, width),
        "out": kernel("self_attn.o_proj", heads, width, dim),
    }
    if any("q_norm" in name for name in named):
        attention["query_norm"] = {"scale": stacked("self_attn.q_norm")}
        attention["key_norm"] = {"scale": stacked("self_attn.k_norm")}
    return {
        "tokens": table("model.embed_tokens"),
        "head": table("lm_head"),
        "blocks": {
            "attention_norm": {"scale": stacked("input_layernorm")},
            "attention": attention,
            "mlp_norm": {"scale": stacked("post_attention_layernorm")},
            "mlp": {name: kernel(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
        },
        "final_norm": {"scale": named["model.norm.weight"]},
    }


if __name__ == "__main__":
    for name in ("llama", "qwen3"):
        np.savez_compressed(FOLDER / f"{name}.npz", **reference(name, 0))
        print(f"wrote {name}.npz")
