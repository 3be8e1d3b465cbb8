"""Full fine-tuning of OpenAI's GPT-2 124M on WikiText, or any text.

    python -m jaxgpt.convert import --from=GPT2_DIR --workdir=runs/gpt2
    python -m jaxgpt.train --config=configs/finetune_gpt2.py \\
        --config.data.source='text:wikitext/train/*.txt' \\
        --config.data.validation_source='text:wikitext/valid/*.txt'

GPT2_DIR is Hugging Face's folder or OpenAI's release. `--config.lora.rank=8
--config.optim.learning_rate=3e-4` trains 0.24% of the parameters instead of all.
"""

from jaxgpt.config import ComputeConfig, Config, DataConfig, OptimConfig, presets


def get_config() -> Config:
    return Config(
        init_from="runs/gpt2",
        num_epochs=3.0,
        batch_size=32,
        grad_accum=4,
        eval_every=100,
        checkpoint_every=100,
        early_stop=3,
        model=presets.gpt2(num_layers=12, num_heads=12, embed_dim=768, dropout=0.1),
        compute=ComputeConfig(dtype="bfloat16"),
        data=DataConfig(tokenizer="gpt2:runs/gpt2/tokenizer"),
        optim=OptimConfig(learning_rate=3e-5, warmup_steps=50, weight_decay=0.01),
    )
