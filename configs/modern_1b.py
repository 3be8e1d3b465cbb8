"""A modern decoder in Llama 3.2 1B's shape: 1,235,814,400 parameters with its 128,256 pieces.

The shape is Meta's release (16 layers of 2048, 32 heads over 8 key heads, tied embeddings,
llama3 RoPE scaling is for its 128k context and left out at 4096); the recipe is ours:
`--config.model.vocab_size=128256` gives exactly that size.
"""

from jaxgpt.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        num_steps=100_000,
        batch_size=256,
        grad_accum=16,
        log_every=10,
        eval_every=1000,
        eval_batches=100,
        sample_every=1000,
        checkpoint_every=1000,
        model=ModelConfig(
            max_seq_len=4096, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64,
            embed_dim=2048, mlp_dim=8192, norm="rmsnorm", norm_eps=1e-5, position="rope",
            rope_theta=500_000.0, activation="swiglu", bias=False, tie_embeddings=True,
            qk_norm=False, dtype="bfloat16", remat="full",
        ),
        data=DataConfig(source="builtin", tokenizer="sentencepiece:32000"),
        optim=OptimConfig(
            learning_rate=3e-4, schedule="wsd", warmup_steps=2000, z_loss=1e-4,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )  # fmt: skip
