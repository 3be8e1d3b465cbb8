"""GPT-2 medium: 354,823,168 parameters with GPT-2's vocabulary (OpenAI 2019, table 2, row 2).

`--config.data.tokenizer=gpt2:DIR` gives exactly that number. Learning rate of GPT-3's model of
about this size (arXiv:2005.14165, table 2.1); parameters and optimizer state are split over all
devices.
"""

from jaxgpt.config import ComputeConfig, Config, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.gpt2(num_layers=24, num_heads=16, embed_dim=1024),
        OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        compute=ComputeConfig(dtype="bfloat16", remat="dots"),
        grad_accum=16,
    )
