"""T5 1.1 small (arXiv:1910.10683 and arXiv:2002.05202): spans of text, in the place of sentinels.

Eight layers each of encoder and decoder of 512, 6 heads of 64, gated GELU of 1024, relative
positions, RMSNorm, no biases; 76,961,152 parameters with its table of 32,128 rows, of which 32,000
pieces and 100 sentinels are used. The encoder reads 512 tokens, of which 15% are the decoder's to
write. Adafactor with the inverse-square-root schedule, whose rate is 0.01 for 10,000 steps.
"""

from jaxgpt.config import Config, DataConfig, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.t5(
            num_layers=8,
            num_heads=6,
            embed_dim=512,
            mlp_dim=1024,
            vocab_size=32128,
            max_source_len=512,
            max_seq_len=128,
        ),
        OptimConfig(
            name="adafactor",
            learning_rate=0.01,
            schedule="rsqrt",
            warmup_steps=10_000,
            weight_decay=0.0,
        ),
        objective="span_corruption",
        batch_size=128,
        num_steps=500_000,
        data=DataConfig(source="builtin", tokenizer="sentencepiece:32000"),
    )
