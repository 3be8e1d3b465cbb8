"""What several configs share: architectures by family, and the habits of a long run."""

import dataclasses

from jaxgpt.config.schema import (
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
)


def gpt2(num_layers: int, num_heads: int, embed_dim: int, **fields) -> ModelConfig:
    """Returns GPT-2's architecture (OpenAI 2019, section 2.3)."""
    sizes = dict(num_layers=num_layers, num_heads=num_heads, embed_dim=embed_dim)
    return ModelConfig(**sizes, **fields)


def llama(
    num_layers: int, num_heads: int, num_kv_heads: int, embed_dim: int, mlp_dim: int, **fields
) -> ModelConfig:
    """Returns Llama 3's architecture (arXiv:2407.21783, section 3.2): RoPE, RMSNorm,
    SwiGLU, grouped-query attention, no biases, separate output embedding."""
    sizes = dict(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
    )
    family = dict(
        norm="rmsnorm",
        position="rope",
        rope_theta=500_000.0,
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
    )
    return ModelConfig(**sizes, **family | fields)


def from_init(**fields) -> ModelConfig:
    """Returns the architecture that `init_from` has; `fields` are given and must agree with it, but
    for those that may differ (dropout, a shorter context)."""
    model = ModelConfig(**fields)
    for field in dataclasses.fields(ModelConfig):
        if field.name not in fields:
            setattr(model, field.name, None)  # left open: see `schema.left_open`
    return model


def long_run(model: ModelConfig, optim: OptimConfig, **fields) -> Config:
    """Returns a pre-training run of days in bfloat16: rare validation, on the built-in corpus.

    Parameters and optimizer state are split over all devices (`mesh.fsdp`).
    """
    habits = dict(
        num_steps=100_000,
        batch_size=512,
        log_every=10,
        eval_every=1000,
        eval_batches=100,
        sample_every=1000,
        checkpoint_every=1000,
        compute=ComputeConfig(dtype="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=-1),
        data=DataConfig(source="builtin", tokenizer="sentencepiece:32000"),
    )
    return Config(model=model, optim=optim, **habits | fields)
