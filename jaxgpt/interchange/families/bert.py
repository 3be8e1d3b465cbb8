"""BERT (arXiv:1810.04805) and RoBERTa (arXiv:1907.11692) as Hugging Face stores them."""

import dataclasses
from collections.abc import Container

from jaxgpt.config import ModelConfig
from jaxgpt.interchange.families.family import (
    COMMON,
    Family,
    activation_of,
    parts,
    require,
    rules_from,
    schema_of,
)
from jaxgpt.system.errors import BadInput

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
FIXED = dict(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
FIELDS = {  # theirs: ours
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_dim",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
LINEAR = {
    "encoder.layer.{layer}.attention.self.query": "blocks/attention/query",
    "encoder.layer.{layer}.attention.self.key": "blocks/attention/key",
    "encoder.layer.{layer}.attention.self.value": "blocks/attention/value",
    "encoder.layer.{layer}.attention.output.dense": "blocks/attention/out",
    "encoder.layer.{layer}.intermediate.dense": "blocks/mlp/up",
    "encoder.layer.{layer}.output.dense": "blocks/mlp/down",
}
NORMS = {
    "embeddings.LayerNorm": "embedding_norm",
    "encoder.layer.{layer}.attention.output.LayerNorm": "blocks/attention_norm",
    "encoder.layer.{layer}.output.LayerNorm": "blocks/mlp_norm",
}
TABLES = {
    "embeddings.word_embeddings.weight": "tokens",
    "embeddings.position_embeddings.weight": "positions/kernel",
    "embeddings.token_type_embeddings.weight": "types",
}
BODY = rules_from(TABLES | parts(LINEAR, "kernel") | parts(NORMS, "scale"), transposed=True)
HEAD = rules_from(
    parts({"cls.predictions.transform.dense": "transform"}, "kernel")
    | parts({"cls.predictions.transform.LayerNorm": "transform_norm"}, "scale")
    | {"cls.predictions.bias": "head_bias", "cls.predictions.decoder.weight": "head"},
    transposed=True,
)
ROBERTA_HEAD = rules_from(
    parts({"lm_head.dense": "transform"}, "kernel")
    | parts({"lm_head.layer_norm": "transform_norm"}, "scale")
    | {"lm_head.bias": "head_bias", "lm_head.decoder.weight": "head"},
    transposed=True,
)
ROBERTA_PAD = 1
ROBERTA_OFFSET = ROBERTA_PAD + 1  # fairseq counts positions from there on


def _model_config(hf: dict) -> ModelConfig:
    require(hf, FIXED)
    hf = {"layer_norm_eps": 1e-12, "tie_word_embeddings": True, "type_vocab_size": 2} | hf
    return ModelConfig(
        **{ours: hf[theirs] for theirs, ours in FIELDS.items()},
        kind="encoder",
        norm_position="post",
        embedding_norm=True,
        head_transform=True,
        head_bias=True,
        activation=activation_of(hf, "hidden_act", "gelu", ACTIVATIONS),
    )


def _hf_config(cfg: ModelConfig) -> dict:
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "model_type": "bert",
        **{theirs: getattr(cfg, ours) for theirs, ours in FIELDS.items()},
        "hidden_act": activations[cfg.activation],
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), cfg.dropout),
    }


def _adapted(head: str):
    """Returns what makes a config that of a folder which may lack the masked-LM head."""

    def adapted(cfg: ModelConfig, names: Container[str]) -> ModelConfig:
        has_head = head in names
        return dataclasses.replace(cfg, head_transform=has_head, head_bias=has_head)

    return adapted


def _roberta_adapted(cfg: ModelConfig, names: Container[str]) -> ModelConfig:
    """Theirs has GELU in the head, whatever `hidden_act` says."""
    cfg = _adapted("lm_head.bias")(cfg, names)
    if cfg.head_transform and cfg.activation != "gelu":
        act = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == cfg.activation)
        raise BadInput(
            f"config.json: hidden_act={act!r} is not supported, only 'gelu', which RoBERTa's head"
            " always has"
        )
    return cfg


def _roberta_model_config(hf: dict) -> ModelConfig:
    pad = hf.get("pad_token_id", ROBERTA_PAD)
    if pad != ROBERTA_PAD:
        raise BadInput(
            f"config.json: pad_token_id={pad!r} is not supported, only {ROBERTA_PAD}: positions"
            " count from the id after it"
        )
    cfg = _model_config(hf)
    return dataclasses.replace(cfg, max_seq_len=cfg.max_seq_len - ROBERTA_OFFSET)


def _roberta_hf_config(cfg: ModelConfig) -> dict:
    rows = {"max_position_embeddings": cfg.max_seq_len + ROBERTA_OFFSET}
    return _hf_config(cfg) | {"model_type": "roberta", "pad_token_id": ROBERTA_PAD} | rows


BERT = Family(
    name="bert",
    architecture="BertForMaskedLM",
    exact=COMMON
    | dict(kind=("encoder",), norm=("layernorm",), norm_position=("post",), position=("learned",))
    | dict(bias=(True,), qk_norm=(False,), activation=tuple(ACTIVATIONS.values()))
    | dict(embedding_norm=(True,), head_transform=(True,), head_bias=(True,))
    | dict(type_vocab_size=range(2, 1 << 16)),
    rules=BODY + HEAD,
    model_config=_model_config,
    hf_config=_hf_config,
    schema=schema_of(FIELDS) | {"hidden_act?": str},
    prefix="bert.",
    ignored=("embeddings.position_ids",),
    adapted=_adapted("cls.predictions.bias"),
    outside=("cls.",),
    skipped=("pooler.", "cls.seq_relationship.", "classifier.", "qa_outputs."),
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    equal_heads=True,
)
ROBERTA = dataclasses.replace(
    BERT,
    name="roberta",
    architecture="RobertaForMaskedLM",
    exact=BERT.exact | {"type_vocab_size": (1,), "activation": ("gelu",)},
    rules=tuple(
        dataclasses.replace(r, skipped=ROBERTA_OFFSET) if r.ours == ("positions/kernel",) else r
        for r in BODY
    )
    + ROBERTA_HEAD,
    model_config=_roberta_model_config,
    hf_config=_roberta_hf_config,
    schema=BERT.schema | {"pad_token_id?": int | None},
    prefix="roberta.",
    adapted=_roberta_adapted,
    outside=("lm_head.",),
    skipped=("pooler.", "classifier.", "qa_outputs."),
    copies={"lm_head.decoder.bias": "lm_head.bias"},
    pad=ROBERTA_PAD,
)
