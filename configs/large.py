"""GPT-2 large: 774,030,080 parameters with GPT-2's vocabulary (OpenAI 2019, table 2, row 3).

`--config.data.tokenizer=gpt2:DIR` gives exactly that number. Learning rate of GPT-3's model of
about this size (arXiv:2005.14165, table 2.1); parameters and optimizer state are split over all
devices.
"""

from jaxgpt.config import ComputeConfig, Config, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.gpt2(num_layers=36, num_heads=20, embed_dim=1280),
        OptimConfig(learning_rate=2.5e-4, warmup_steps=2000),
        compute=ComputeConfig(dtype="bfloat16", remat="dots"),
        grad_accum=32,
    )
