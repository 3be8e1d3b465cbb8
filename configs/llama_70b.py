"""Llama 3 70B's shape (arXiv:2407.21783, table 3): 70,553,706,496 parameters.

The vocabulary is set to Llama 3's 128,256 pieces, whatever the tokenizer. Sequences of 4096, one a
device at a time on 64 chips of 95 GiB: `--config.mesh.fsdp=64`, or in stages,
`--config.mesh.fsdp=16 --config.mesh.pipeline=4`.
"""

from jaxgpt.config import ComputeConfig, Config, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.llama(
            num_layers=80,
            num_heads=64,
            num_kv_heads=8,
            embed_dim=8192,
            mlp_dim=28672,
            max_seq_len=4096,
            vocab_size=128_256,
        ),
        OptimConfig(learning_rate=1.5e-4, final_lr_ratio=0.01, warmup_steps=8000),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        batch_size=64,
    )
