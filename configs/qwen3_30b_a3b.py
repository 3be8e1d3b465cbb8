"""Qwen3-30B-A3B's shape (arXiv:2505.09388, table 2): 30,532,122,624 parameters, of which a token
goes through 3.35 billion.

The vocabulary is set to Qwen3's 151,936 rows, whatever the tokenizer. Sequences of 4096, one a
device at a time on 64 chips.
"""

from jaxgpt.config import ComputeConfig, Config, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.llama(
            num_layers=48,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            embed_dim=2048,
            mlp_dim=6144,
            max_seq_len=4096,
            vocab_size=151_936,
            norm_eps=1e-6,
            rope_theta=1e6,
            qk_norm=True,
            num_experts=128,
            experts_per_token=8,
            expert_dim=768,
            balance_loss=0.001,
        ),
        OptimConfig(learning_rate=3e-4, final_lr_ratio=0.1, warmup_steps=2000),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        batch_size=64,
    )
