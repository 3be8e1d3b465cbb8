"""The laptop quickstart: a 1.3M-parameter GPT learns Python from the standard library."""

from jaxgpt.config import Config, DataConfig, ModelConfig, OptimConfig, SampleConfig


def get_config() -> Config:
    return Config(
        num_steps=900,
        batch_size=8,
        log_every=50,
        eval_every=225,
        sample_every=225,
        checkpoint_every=225,
        model=ModelConfig(max_seq_len=256, num_layers=4, num_heads=4, embed_dim=128),
        data=DataConfig(tokenizer="sentencepiece:4096", validation_fraction=0.02),
        optim=OptimConfig(name="muon", learning_rate=1e-2, b1=0.95, warmup_steps=50),
        sample=SampleConfig(prompt="class ", max_new_tokens=150),
    )
