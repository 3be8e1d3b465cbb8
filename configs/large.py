"""GPT-2 large: 774,030,080 parameters with GPT-2's vocabulary (OpenAI 2019, table 2, row 3).

`--config.data.tokenizer=gpt2:DIR` gives exactly that number. Learning rate of GPT-3's model of
about this size (arXiv:2005.14165, table 2.1); parameters and optimizer state are split over all
devices.
"""

from jaxgpt.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        num_steps=100_000,
        batch_size=512,
        grad_accum=32,
        log_every=10,
        eval_every=1000,
        eval_batches=100,
        sample_every=1000,
        checkpoint_every=1000,
        model=ModelConfig(
            num_layers=36, num_heads=20, embed_dim=1280, dtype="bfloat16", remat="dots",
        ),
        data=DataConfig(source="builtin", tokenizer="sentencepiece:32000"),
        optim=OptimConfig(learning_rate=2.5e-4, warmup_steps=2000),
        mesh=MeshConfig(data=1, fsdp=-1),
    )  # fmt: skip
