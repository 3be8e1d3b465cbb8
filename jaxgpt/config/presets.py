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


def bert(num_layers: int, num_heads: int, embed_dim: int, **fields) -> ModelConfig:
    """Returns BERT's architecture with its masked language model's head (arXiv:1810.04805): an
    encoder, post-norm, with token types and normalised embeddings."""
    sizes = dict(num_layers=num_layers, num_heads=num_heads, embed_dim=embed_dim)
    family = dict(
        kind="encoder",
        max_seq_len=512,
        norm_eps=1e-12,
        norm_position="post",
        activation="gelu",
        type_vocab_size=2,
        embedding_norm=True,
        head_transform=True,
        head_bias=True,
    )
    return ModelConfig(**sizes, **family | fields)


def t5(
    num_layers: int, num_heads: int, embed_dim: int, mlp_dim: int, head_dim: int = 64, **fields
) -> ModelConfig:
    """Returns T5 1.1's architecture (arXiv:1910.10683 and arXiv:2002.05202): encoder and decoder of
    `num_layers` each, relative positions, gated GELU, RMSNorm, no biases, separate output
    embedding, scores that are not scaled."""
    sizes = dict(
        num_layers=num_layers,
        num_heads=num_heads,
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        head_dim=head_dim,
    )
    family = dict(
        kind="encoder_decoder",
        norm="rmsnorm",
        norm_eps=1e-6,
        position="relative",
        activation="geglu",
        bias=False,
        tie_embeddings=False,
        scale_attention=False,
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
