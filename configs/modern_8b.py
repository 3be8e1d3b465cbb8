"""Llama 3 8B's shape (arXiv:2407.21783, table 3): 8,030,261,248 parameters.

The vocabulary is set to Llama 3's 128,256 pieces, whatever the tokenizer. Sequences of 4096,
one a device at a time on 256 chips.
"""

from jaxgpt.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        num_steps=100_000,
        batch_size=256,
        grad_accum=1,
        log_every=10,
        eval_every=1000,
        eval_batches=100,
        sample_every=1000,
        checkpoint_every=1000,
        model=ModelConfig(
            max_seq_len=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
            embed_dim=4096, mlp_dim=14336, norm="rmsnorm", norm_eps=1e-5, position="rope",
            rope_theta=500_000.0, activation="swiglu", bias=False, tie_embeddings=False,
            qk_norm=False, dtype="bfloat16", remat="full",
            vocab_size=128_256,
        ),
        data=DataConfig(source="builtin", tokenizer="sentencepiece:32000"),
        optim=OptimConfig(
            learning_rate=3e-4, final_lr_ratio=0.01, warmup_steps=8000,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )  # fmt: skip
