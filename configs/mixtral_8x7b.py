"""Mixtral 8x7B's shape (arXiv:2401.04088, table 1): 46,702,792,704 parameters, of which a token
goes through 12.9 billion.

The vocabulary is set to Mixtral's 32,000 pieces, whatever the tokenizer. Sequences of 4096, one a
device at a time on 64 chips.
"""

from jaxgpt.config import ComputeConfig, Config, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.llama(
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            embed_dim=4096,
            mlp_dim=14336,
            max_seq_len=4096,
            vocab_size=32_000,
            rope_theta=1e6,
            num_experts=8,
            experts_per_token=2,
            balance_loss=0.02,
        ),
        OptimConfig(learning_rate=3e-4, final_lr_ratio=0.1, warmup_steps=2000),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        batch_size=64,
    )
