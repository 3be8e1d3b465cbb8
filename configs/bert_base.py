"""BERT base (arXiv:1810.04805, section 3): a masked language model of text.

Twelve layers of 768, 12 heads, 512 tokens; 109,514,298 parameters, which are those of
transformers' `BertForMaskedLM` (its head included; there is no pooler): a vocabulary of 30,519
pieces, [MASK], [CLS] and [SEP]. 256 sequences a step, Adam with a rate of 1e-4, 10,000 warm-up
steps and a linear descent over a million, weight decay 0.01, dropout 0.1.
"""

from jaxgpt.config import Config, DataConfig, OptimConfig, presets


def get_config() -> Config:
    return presets.long_run(
        presets.bert(num_layers=12, num_heads=12, embed_dim=768, dropout=0.1),
        OptimConfig(
            learning_rate=1e-4,
            schedule="linear",
            warmup_steps=10_000,
            final_lr_ratio=0.0,
            b2=0.999,
            eps=1e-6,
            weight_decay=0.01,
        ),
        objective="masked_lm",
        batch_size=256,
        num_steps=1_000_000,
        data=DataConfig(source="builtin", tokenizer="sentencepiece:30519"),
    )
