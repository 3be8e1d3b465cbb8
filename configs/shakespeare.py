"""Characters of one text file: the usual small test of a trainer.

    python -m jaxgpt.train --config=configs/shakespeare.py --config.data.source=text:FILE

It needs that text, a file of yours (without the flag: shakespeare.txt in the current folder). Tiny
Shakespeare is data/tinyshakespeare/input.txt in the repository karpathy/char-rnn on GitHub.

nanoGPT's train_shakespeare_char: 6 layers of 384, context 256, dropout 0.2, 5000 steps of 64
sequences; its README reports a best validation loss of 1.4697 on a 1.1 MB Tiny Shakespeare with
the last tenth held out, on an A100. Validation is lowest near step 2000; after that it overfits.
"""

from jaxgpt.config import Config, DataConfig, ModelConfig, OptimConfig, SampleConfig


def get_config() -> Config:
    return Config(
        num_steps=5000,
        batch_size=64,
        log_every=10,
        eval_every=250,
        sample_every=500,
        checkpoint_every=250,
        model=ModelConfig(
            max_seq_len=256, num_layers=6, num_heads=6, embed_dim=384, bias=False, dropout=0.2
        ),
        data=DataConfig(source="text:shakespeare.txt", tokenizer="char", validation_fraction=0.1),
        optim=OptimConfig(learning_rate=1e-3, b2=0.99, warmup_steps=100),
        sample=SampleConfig(prompt="\n", max_new_tokens=250),
    )
