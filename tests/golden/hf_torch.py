"""The reference for encoders and encoder-decoders: transformers' BERT, RoBERTa, T5, T5 1.1, BART.

`python tests/golden/hf_torch.py` (extra [parity]) rewrites bert.npz, roberta.npz, ... Arrays have
transformers' names: the tests read them through the importer.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
BERT = dict(
    vocab_size=67,
    hidden_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=28,
    max_position_embeddings=30,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
T5 = dict(
    vocab_size=403,
    d_model=20,
    d_kv=3,
    d_ff=28,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
BART = dict(
    vocab_size=269,
    d_model=20,
    encoder_layers=3,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=28,
    decoder_ffn_dim=28,
    max_position_embeddings=30,
    dropout=0.0,
    scale_embedding=True,
)
CONFIGS = {
    "bert": ("BertForMaskedLM", "BertConfig", BERT | dict(type_vocab_size=3)),
    "roberta": (
        "RobertaForMaskedLM",
        "RobertaConfig",
        BERT | dict(type_vocab_size=1, vocab_size=269),
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5_1_1": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
}
ENCODERS = ("bert", "roberta")
LENGTHS, SOURCES = (19, 11, 6), (23, 9, 17)  # of padded rows
IGNORED = -100  # torch's


def make_model(name: str, seed: int):
    """A model of which every parameter is random: norms and biases too, and a head of its own where
    the real files have one."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model_class, config_class, fields = CONFIGS[name]
    config = getattr(transformers, config_class)(**fields, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).eval()
    if name == "t5_1_1":  # since version 5 transformers ties them when it makes a model
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter))
        if name == "bart":
            model.final_logits_bias.normal_()
    return model


def batch(name: str, seed: int) -> dict[str, np.ndarray]:
    """Padded rows by transformers' names. A third of an encoder's tokens are targets."""
    rng, vocab = np.random.default_rng(seed), CONFIGS[name][2]["vocab_size"]
    pad = {"bert": 0, "t5": 0, "t5_1_1": 0, "roberta": 1, "bart": 1}[name]

    def rows(lengths):
        ids = rng.integers(3, vocab, (len(lengths), max(lengths)))
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        return np.where(mask, ids, pad), mask

    labels, mask = rows(LENGTHS)
    if name in ENCODERS:
        tokens, types = rows(LENGTHS)[0], rng.integers(0, 3, labels.shape) * (name == "bert")
        counted = mask & (rng.random(labels.shape) < 0.33)
        found = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
        return found | {"labels": np.where(counted, labels, IGNORED)}
    sources, source_mask = rows(SOURCES)
    start = 2 if name == "bart" else 0
    decoder = np.pad(labels, ((0, 0), (1, 0)), constant_values=start)[:, :-1]
    found = {"input_ids": sources, "attention_mask": source_mask, "decoder_input_ids": decoder}
    return found | {"labels": np.where(mask, labels, IGNORED)}


def reference(name: str, seed: int) -> dict[str, np.ndarray]:
    """The config, weights, a batch, its logits, its loss and the gradients."""
    import torch

    model, arrays = make_model(name, seed), batch(name, seed)
    out = model(**{key: torch.tensor(value).long() for key, value in arrays.items()})
    out.loss.backward()
    config = model.config.to_dict()
    if name == "t5_1_1":
        config["tie_word_embeddings"] = False  # as in the real files
    found = {f"batch/{key}": value.astype(np.int32) for key, value in arrays.items()}
    found |= {"config": np.array(json.dumps(config)), "loss": out.loss.detach().numpy()}
    found["logits"] = out.logits.detach().numpy()
    buffers = {"final_logits_bias": model.final_logits_bias} if name == "bart" else {}
    for path, parameter in model.named_parameters():
        found[f"weight/{path}"] = parameter.detach().numpy().copy()
        found[f"grad/{path}"] = parameter.grad.numpy().copy()
    for path, buffer in buffers.items():
        found[f"weight/{path}"] = buffer.numpy().copy()
    return found


if __name__ == "__main__":
    for name in CONFIGS:
        np.savez_compressed(FOLDER / f"{name}.npz", **reference(name, 0))
        print(f"wrote {name}.npz")
