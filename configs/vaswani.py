"""The 2017 base Transformer (arXiv:1706.03762, table 3, base): an encoder and a decoder.

Six layers of 512 each, 8 heads, feed-forward of 2048, post-norm, ReLU, sinusoidal positions, one
table of embeddings for source, target and output, scaled by sqrt(512) where they are looked up;
dropout 0.1, label smoothing 0.1; Adam with b2 = 0.98, eps = 1e-9 and the inverse-square-root
schedule with 4000 warm-up steps, whose peak 512**-0.5 * 4000**-0.5 is the learning rate here. With
the paper's vocabulary of 37,000 byte pairs it has 63,082,496 parameters.

Name the rows of your translation: --config.data.source=jsonl:pairs.jsonl
"""

from jaxgpt.config import Config, DataConfig, MeshConfig, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.gpt2(
            kind="encoder_decoder",
            num_layers=6,
            num_heads=8,
            embed_dim=512,
            max_seq_len=256,
            norm_position="post",
            position="sinusoidal",
            activation="relu",
            scale_embeddings=True,
            dropout=0.1,
        ),
        OptimConfig(
            learning_rate=512**-0.5 * 4000**-0.5,
            schedule="rsqrt",
            warmup_steps=4000,
            b2=0.98,
            eps=1e-9,
            weight_decay=0.0,
            clip_norm=0.0,
            label_smoothing=0.1,
        ),
        objective="seq2seq",
        batch_size=256,
        mesh=MeshConfig(data=-1),
        data=DataConfig(source="jsonl:pairs.jsonl", tokenizer="sentencepiece:37000"),
    )
