"""A modern decoder in Llama 3.2 1B's shape: 1,235,814,400 parameters with its 128,256 pieces.

The shape is Meta's release (16 layers of 2048, 32 heads over 8 key heads, tied embeddings,
llama3 RoPE scaling is for its 128k context and left out at 4096); the recipe is ours:
`--config.model.vocab_size=128256` gives exactly that size.
"""

from jaxgpt.config import ComputeConfig, Config, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.llama(
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            embed_dim=2048,
            mlp_dim=8192,
            max_seq_len=4096,
            tie_embeddings=True,
        ),
        OptimConfig(learning_rate=3e-4, schedule="wsd", warmup_steps=2000, z_loss=1e-4),
        batch_size=256,
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        grad_accum=16,
    )
