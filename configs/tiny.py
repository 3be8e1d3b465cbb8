"""The laptop quickstart."""

from jaxgpt.config import Config, DataConfig, ModelConfig, OptimConfig, SampleConfig


def get_config() -> Config:
    return Config(
        num_steps=1000,
        batch_size=16,
        log_every=20,
        eval_every=250,
        sample_every=250,
        checkpoint_every=250,
        model=ModelConfig(max_seq_len=256, num_layers=4, num_heads=4, embed_dim=128),
        data=DataConfig(source="builtin", tokenizer="sentencepiece:4096"),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=50),
        sample=SampleConfig(max_new_tokens=150),
    )
