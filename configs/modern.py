"""A modern decoder of about 300M parameters (315,936,768 with 32,000 pieces).

RoPE, RMSNorm, SwiGLU, grouped-query attention, qk-norm as in Qwen3 (arXiv:2505.09388), Muon
with AdamW-sized updates (arXiv:2502.16982), warm-up-stable-decay. Width and depth are ours: 24
layers of 1024, a feed-forward of 8/3 the width rounded up to a multiple of 256.
"""

from jaxgpt.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        num_steps=100_000,
        batch_size=512,
        grad_accum=16,
        log_every=10,
        eval_every=1000,
        eval_batches=100,
        sample_every=1000,
        checkpoint_every=1000,
        model=ModelConfig(
            max_seq_len=1024, num_layers=24, num_heads=16, num_kv_heads=8, head_dim=64,
            embed_dim=1024, mlp_dim=2816, norm="rmsnorm", norm_eps=1e-6, position="rope",
            rope_theta=10_000.0, activation="swiglu", bias=False, tie_embeddings=True,
            qk_norm=True, dtype="bfloat16", remat="dots",
        ),
        data=DataConfig(source="builtin", tokenizer="sentencepiece:32000"),
        optim=OptimConfig(
            name="muon", learning_rate=1e-3, b1=0.95, schedule="wsd", warmup_steps=500, z_loss=1e-4,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )  # fmt: skip
