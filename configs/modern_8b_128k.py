"""Llama 3.1 8B's shape and context (arXiv:2407.21783, section 3.4): 8,030,261,248 parameters,
131,072 tokens.

For 64 devices with 95 GB, such as v5p:4x4x4: 16 share each sequence (`mesh.context`), four
sequences a step. `--config.init_from=DIR` continues a model of a shorter context.
"""

from jaxgpt.config import ComputeConfig, Config, MeshConfig, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.llama(
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            embed_dim=4096,
            mlp_dim=14336,
            max_seq_len=131_072,
            vocab_size=128_256,
            rope_scaling="llama3",
            rope_factor=8.0,
            rope_original_len=8192,
        ),
        OptimConfig(learning_rate=3e-5, final_lr_ratio=0.01, warmup_steps=100),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=1, fsdp=-1, context=16),
        batch_size=4,
    )
