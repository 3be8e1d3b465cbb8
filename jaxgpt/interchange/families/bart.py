"""BART (arXiv:1910.13461) as Hugging Face stores it."""

import dataclasses
from collections.abc import Container

from jaxgpt.config import ModelConfig
from jaxgpt.interchange.families.family import (
    COMMON,
    Family,
    Rule,
    activation_of,
    parts,
    require,
    rules_from,
    schema_of,
)
from jaxgpt.system.errors import BadInput

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
FIELDS = {  # theirs: ours
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "decoder_layers": "num_layers",
    "encoder_layers": "encoder_layers",
    "decoder_attention_heads": "num_heads",
    "d_model": "embed_dim",
    "decoder_ffn_dim": "mlp_dim",
    "scale_embedding": "scale_embeddings",
    "tie_word_embeddings": "tie_embeddings",
}
OF_BOTH = {"encoder_attention_heads": "decoder_attention_heads"}
OF_BOTH |= {"encoder_ffn_dim": "decoder_ffn_dim"}
EPS = 1e-5
OFFSET = 2  # fairseq counts positions from there on
PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}


def _tensors(side: str, cross: bool) -> dict[str, str]:
    """Returns the names of a stack's tensors and ours; `cross`: it attends to the other's."""
    theirs, ours = f"{side}.layers.{{layer}}", f"{side}/blocks"
    attention = {"self_attn": "attention"} | ({"encoder_attn": "cross_attention"} if cross else {})
    linear = {
        f"{theirs}.{one}.{projection}": f"{ours}/{other}/{name}"
        for one, other in attention.items()
        for projection, name in PROJECTIONS.items()
    }
    norms = {
        f"{side}.layernorm_embedding": f"{side}/embedding_norm",
        f"{theirs}.self_attn_layer_norm": f"{ours}/attention_norm",
        f"{theirs}.final_layer_norm": f"{ours}/mlp_norm",
        **({f"{theirs}.encoder_attn_layer_norm": f"{ours}/cross_norm"} if cross else {}),
    }
    linear |= {f"{theirs}.fc1": f"{ours}/mlp/up", f"{theirs}.fc2": f"{ours}/mlp/down"}
    return parts(linear, "kernel") | parts(norms, "scale")


def _model_config(hf: dict) -> ModelConfig:
    hf = {"scale_embedding": False, "tie_word_embeddings": True} | hf
    for one, other in OF_BOTH.items():
        if hf[one] != hf[other]:
            raise BadInput(f"config.json: {one}={hf[one]!r} is not {other}={hf[other]!r}")
    # Older files of its relatives say so
    require(hf, dict(normalize_before=False, add_final_layer_norm=False, is_decoder=False))
    require(hf, dict(static_position_embeddings=False, normalize_embedding=True))
    return ModelConfig(
        **{ours: hf[theirs] for theirs, ours in FIELDS.items()},
        max_source_len=hf["max_position_embeddings"],
        kind="encoder_decoder",
        norm_position="post",
        norm_eps=EPS,
        embedding_norm=True,
        head_bias=True,
        activation=activation_of(hf, "activation_function", "gelu", ACTIVATIONS),
    )


def _adapted(cfg: ModelConfig, names: Container[str]) -> ModelConfig:
    return dataclasses.replace(cfg, head_bias="final_logits_bias" in names)


def _hf_config(cfg: ModelConfig) -> dict:
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    fields = {theirs: getattr(cfg, ours) for theirs, ours in FIELDS.items()}
    dropout = dict.fromkeys(("dropout", "attention_dropout"), cfg.dropout)
    return {
        "model_type": "bart",
        **fields,
        **{one: fields[other] for one, other in OF_BOTH.items()},
        "activation_function": activations[cfg.activation],
        "is_encoder_decoder": True,
        **dropout,
    }


BART = Family(
    name="bart",
    architecture="BartForConditionalGeneration",
    exact={name: values for name, values in COMMON.items() if name != "scale_embeddings"}
    | dict(kind=("encoder_decoder",), norm=("layernorm",), position=("learned",), bias=(True,))
    | dict(norm_position=("post",), norm_eps=(EPS,), embedding_norm=(True,), qk_norm=(False,))
    | dict(head_bias=(True, False), activation=tuple(ACTIVATIONS.values())),
    rules=rules_from(
        {"shared.weight": "tokens", "lm_head.weight": "head"}
        | _tensors("encoder", cross=False)
        | _tensors("decoder", cross=True),
        transposed=True,
    )
    + tuple(
        Rule(f"{side}.embed_positions.weight", (f"{side}/positions/kernel",), skipped=OFFSET)
        for side in ("encoder", "decoder")
    )
    + (Rule("final_logits_bias", ("head_bias",), is_row=True),),
    model_config=_model_config,
    hf_config=_hf_config,
    schema=schema_of(FIELDS)
    | {"activation_function?": str, "encoder_attention_heads?": int, "encoder_ffn_dim?": int},
    prefix="model.",
    ignored=("encoder.version", "decoder.version"),
    adapted=_adapted,
    same=(("max_source_len", "max_seq_len"),),
    outside=("lm_head.", "final_logits_bias"),
    skipped=("classification_head.", "qa_outputs."),
    copies={"encoder.embed_tokens.weight": "shared.weight"}
    | {"decoder.embed_tokens.weight": "shared.weight"},
    equal_heads=True,
)
