"""Fine-tuning of any supported model: architecture and tokenizer are those of `init_from`.

    python -m jaxgpt.train --config=configs/finetune.py --config.init_from=DIR \\
        --config.data.source='sft:rows.jsonl'

DIR is a Hugging Face folder (GPT-2, Llama, Qwen3, Mixtral; BERT, RoBERTa, T5 or BART with an
objective of theirs), OpenAI's GPT-2 release or a workdir. A field of the model that is given all
the same must be as it is there, but for `dropout`, a shorter `max_seq_len` (1024, or the model's if
that is less) and `num_experts` of a dense model, which starts a mixture. The recipe is for hundreds
to thousands of rows: a large batch would leave few steps. 5e-5 is the learning rate of Hugging
Face's Trainer.
`--config.lora.rank=8 --config.optim.learning_rate=3e-4` trains low-rank additions alone.
"""

from jaxgpt.config import ComputeConfig, Config, DataConfig, OptimConfig, presets


def get_config() -> Config:
    return Config(
        num_epochs=3.0,
        batch_size=4,
        eval_every=50,
        checkpoint_every=50,
        early_stop=3,
        model=presets.from_init(),
        compute=ComputeConfig(dtype="bfloat16"),
        data=DataConfig(tokenizer="", pack=True),
        optim=OptimConfig(
            learning_rate=5e-5, warmup_steps=0, warmup_fraction=0.05, weight_decay=0.01
        ),
    )
