"""A student of any supported model: it learns from your text and from the teacher's view of it.

    python -m jaxgpt.train --config=configs/distill.py --config.objectives.distill.teacher=DIR \\
        --config.init_from=DIR --config.init_layers=every_second --config.data.source='text:*.txt'

DIR is a workdir or a Hugging Face folder (GPT-2, Llama, Qwen3). With `init_from` the student starts
from every second layer of it (arXiv:1910.01108, section 2); without, from nothing, and any size may
be given: `--config.model.num_layers=2 --config.model.embed_dim=64 --config.model.head_dim=16
--config.model.mlp_dim=256`. What is not given is as in the teacher, the tokenizer always.
"""

from jaxgpt.config import Config, DataConfig, DistillConfig, ObjectivesConfig, OptimConfig, presets


def get_config() -> Config:
    return Config(
        objective="distill",
        num_steps=1000,
        batch_size=8,
        log_every=50,
        eval_every=250,
        checkpoint_every=250,
        model=presets.from_init(),
        data=DataConfig(tokenizer="", validation_fraction=0.02),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=0, warmup_fraction=0.05),
        objectives=ObjectivesConfig(distill=DistillConfig(temperature=2.0, alpha=0.5)),
    )
