"""GPT-2 124M (OpenAI 2019) on half a million tokens a step.

Runs anywhere as it stands: the built-in corpus, 32,000 pieces. For GPT-2's own 124,439,808
parameters and a corpus worth 124M of them:

    --config.data.tokenizer=gpt2:DIR --config.data.source=text:'DIR/*.txt'

Recipe: nanoGPT's, which follows GPT-3's (arXiv:2005.14165, table 2.1). 32 sequences a
microbatch suit eight 16 GB TPU chips or one 80 GB GPU; change grad_accum for more or less.
"""

from jaxgpt.config import Config, MeshConfig, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.gpt2(num_layers=12, num_heads=12, embed_dim=768),
        OptimConfig(learning_rate=6e-4, warmup_steps=2000),
        grad_accum=16,
        mesh=MeshConfig(data=-1),
    )
