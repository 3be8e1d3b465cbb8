"""The laptop quickstart: a 1.3M-parameter GPT learns Python from the standard library."""

from jaxgpt.config import Config, DataConfig, ModelConfig, OptimConfig, SampleConfig


def get_config() -> Config:
    return Config(
        num_steps=1800,
        batch_size=8,
        log_every=50,
        eval_every=450,
        sample_every=450,
        checkpoint_every=450,
        model=ModelConfig(
            max_seq_len=256,
            num_layers=2,
            num_heads=4,
            embed_dim=160,
            mlp_dim=448,
            norm="rmsnorm",
            position="rope",
            qk_norm=True,
            activation="swiglu",
            bias=False,
        ),
        data=DataConfig(tokenizer="sentencepiece:4096", validation_fraction=0.02),
        optim=OptimConfig(
            name="muon",
            learning_rate=1e-2,
            b1=0.95,
            schedule="linear",
            warmup_steps=50,
            final_lr_ratio=0.0,
        ),
        sample=SampleConfig(prompt="class ", max_new_tokens=150),
    )
