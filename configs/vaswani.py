"""The decoder of the 2017 base Transformer as a language model (arXiv:1706.03762, table 3, base).

Six layers of 512, 8 heads, feed-forward of 2048, post-norm, ReLU, sinusoidal positions,
embeddings scaled by sqrt(512) and shared with the output, dropout 0.1; Adam with b2 = 0.98,
eps = 1e-9 and the inverse-square-root schedule with 4000 warm-up steps, whose peak
512**-0.5 * 4000**-0.5 is the learning rate here. There is no encoder to attend to.
"""

from jaxgpt.config import Config, MeshConfig, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.gpt2(
            num_layers=6,
            num_heads=8,
            embed_dim=512,
            max_seq_len=512,
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
        ),
        batch_size=64,
        mesh=MeshConfig(data=-1),
    )
