"""Llama 3 8B's shape (arXiv:2407.21783, table 3): 8,030,261,248 parameters.

The vocabulary is set to Llama 3's 128,256 pieces, whatever the tokenizer. Sequences of 4096,
one a device at a time on 256 chips.
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
            vocab_size=128_256,
        ),
        OptimConfig(learning_rate=3e-4, final_lr_ratio=0.01, warmup_steps=8000),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        batch_size=256,
    )
