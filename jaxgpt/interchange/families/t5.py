"""T5 (arXiv:1910.10683), T5 1.1 and FLAN-T5 (arXiv:2210.11416) as Hugging Face stores them.

Theirs are two variants: the first is `relu` with tied embeddings, and its logits are scaled by
1 / sqrt(embed_dim); 1.1 and FLAN-T5 are gated, untied and unscaled.
"""

import dataclasses
from collections.abc import Container

from jaxgpt.config import ModelConfig
from jaxgpt.interchange.families.family import COMMON, Family, Rule, rules_from, schema_of
from jaxgpt.system.errors import BadInput

ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}  # theirs: ours
FIELDS = {  # theirs: ours
    "vocab_size": "vocab_size",
    "num_decoder_layers": "num_layers",
    "num_layers": "encoder_layers",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_model": "embed_dim",
    "d_ff": "mlp_dim",
    "layer_norm_epsilon": "norm_eps",
    "relative_attention_num_buckets": "relative_buckets",
    "relative_attention_max_distance": "relative_max_distance",
    "n_positions": "max_seq_len",
    "n_source_positions": "max_source_len",
}
DEFAULTS = dict(relative_attention_num_buckets=32, relative_attention_max_distance=128)
DEFAULTS |= dict(layer_norm_epsilon=1e-6, n_positions=512)  # no limit of theirs, what they saw


def _tensors(side: str, cross: bool) -> dict[str, str]:
    """Returns the names of a stack's tensors and ours; `cross`: it attends to the other's."""
    theirs, ours = f"{side}.block.{{layer}}.layer", f"{side}/blocks"
    attention = {"0.SelfAttention": "attention"} | (
        {"1.EncDecAttention": "cross_attention"} if cross else {}
    )
    projections = {"q": "query", "k": "key", "v": "value", "o": "out"}
    mlp = 1 + cross
    return {
        **{
            f"{theirs}.{one}.{letter}.weight": f"{ours}/{other}/{name}/kernel"
            for one, other in attention.items()
            for letter, name in projections.items()
        },
        f"{theirs}.0.layer_norm.weight": f"{ours}/attention_norm/scale",
        **({f"{theirs}.1.layer_norm.weight": f"{ours}/cross_norm/scale"} if cross else {}),
        f"{theirs}.{mlp}.layer_norm.weight": f"{ours}/mlp_norm/scale",
        f"{theirs}.{mlp}.DenseReluDense.wi_0.weight": f"{ours}/mlp/gate/kernel",
        f"{theirs}.{mlp}.DenseReluDense.wo.weight": f"{ours}/mlp/down/kernel",
        f"{side}.final_layer_norm.weight": f"{side}/final_norm/scale",
        f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            f"{side}/relative/kernel"
        ),
    }


def _up(side: str, mlp: int) -> tuple[Rule, Rule]:
    """Returns the rules of the projection that a gate multiplies, and of one without a gate."""
    theirs = f"{side}.block.{{layer}}.layer.{mlp}.DenseReluDense.wi"
    up, gate = f"{side}/blocks/mlp/up/kernel", f"{side}/blocks/mlp/gate/kernel"
    gated = Rule(f"{theirs}_1.weight", (up,), transposed=True, needs=gate)
    return gated, Rule(f"{theirs}.weight", (up,), transposed=True, unless=gate)


def _model_config(hf: dict) -> ModelConfig:
    activation = hf.get("feed_forward_proj", "relu")
    if activation not in ACTIVATIONS:
        raise BadInput(f"config.json: feed_forward_proj={activation!r} is not supported")
    hf = {"num_decoder_layers": None} | DEFAULTS | hf
    hf["num_decoder_layers"] = hf["num_decoder_layers"] or hf["num_layers"]
    hf["n_source_positions"] = hf.get("n_source_positions") or hf["n_positions"]
    # Since version 5 transformers writes `scale_decoder_outputs` and always ties
    tied = hf.get("tie_word_embeddings", True)
    return ModelConfig(
        **{ours: hf[theirs] for theirs, ours in FIELDS.items()},
        kind="encoder_decoder",
        norm="rmsnorm",
        position="relative",
        activation=ACTIVATIONS[activation],
        bias=False,
        tie_embeddings=tied,
        scale_attention=False,
        scale_logits=hf.get("scale_decoder_outputs", tied),
    )


def _adapted(cfg: ModelConfig, names: Container[str]) -> ModelConfig:
    """What is not scaled has a head of its own, if there is one in the files."""
    tied = "lm_head.weight" not in names or (cfg.tie_embeddings and cfg.scale_logits)
    return dataclasses.replace(cfg, tie_embeddings=tied)


def _hf_config(cfg: ModelConfig) -> dict:
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "model_type": "t5",
        **{theirs: getattr(cfg, ours) for theirs, ours in FIELDS.items()},
        "feed_forward_proj": activations[cfg.activation],
        "tie_word_embeddings": cfg.tie_embeddings,
        "is_encoder_decoder": True,
        "dropout_rate": cfg.dropout,
    }


T5 = Family(
    name="t5",
    architecture="T5ForConditionalGeneration",
    exact=COMMON
    | dict(kind=("encoder_decoder",), norm=("rmsnorm",), position=("relative",), bias=(False,))
    | dict(qkv_bias=(False,), qk_norm=(False,), activation=tuple(ACTIVATIONS.values()))
    | dict(scale_attention=(False,), scale_logits=(True, False)),
    rules=rules_from(
        {"shared.weight": "tokens", "lm_head.weight": "head"}
        | _tensors("encoder", cross=False)
        | _tensors("decoder", cross=True),
        transposed=True,
    )
    + _up("encoder", 1)
    + _up("decoder", 2),
    model_config=_model_config,
    hf_config=_hf_config,
    schema=schema_of(FIELDS)
    | {"num_decoder_layers?": int | None, "feed_forward_proj?": str}
    | {"tie_word_embeddings?": bool, "scale_decoder_outputs?": bool},
    prefix="",
    ignored=("EncDecAttention.relative_attention_bias.weight",),  # of the first files; never used
    adapted=_adapted,
    same=(("scale_logits", "tie_embeddings"),),
    copies={"encoder.embed_tokens.weight": "shared.weight"}
    | {"decoder.embed_tokens.weight": "shared.weight"},
)
