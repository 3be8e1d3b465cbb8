"""A modern decoder of about 300M parameters (315,936,768 with 32,000 pieces).

RoPE, RMSNorm, SwiGLU, grouped-query attention, qk-norm as in Qwen3 (arXiv:2505.09388), Muon
with AdamW-sized updates (arXiv:2502.16982), warm-up-stable-decay. Width and depth are ours: 24
layers of 1024, a feed-forward of 8/3 the width rounded up to a multiple of 256.
"""

from jaxgpt.config import ComputeConfig, Config, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.llama(
            num_layers=24,
            num_heads=16,
            num_kv_heads=8,
            embed_dim=1024,
            mlp_dim=2816,
            norm_eps=1e-6,
            rope_theta=10_000.0,
            tie_embeddings=True,
            qk_norm=True,
        ),
        OptimConfig(
            name="muon", learning_rate=1e-3, b1=0.95, schedule="wsd", warmup_steps=500, z_loss=1e-4
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="dots"),
        grad_accum=16,
    )
