"""Llama and Qwen3 as Hugging Face stores them."""

import dataclasses
from typing import Any

from jaxgpt.config import ModelConfig
from jaxgpt.interchange.families.family import COMMON, Family, require, rules_from, schema_of
from jaxgpt.ops.context.frequencies import attention_factor
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import check_json

LLAMA_FIXED = dict(hidden_act="silu", attention_bias=False, mlp_bias=False)
LLAMA_FIXED |= dict(use_sliding_window=False, pretraining_tp=1)
ROPE_SCHEMA = {
    **{"rope_type?": str, "type?": str, "rope_theta?": float, "factor?": float},
    "original_max_position_embeddings?": int,
    **{f"{name}?": float | None for name in ("beta_fast", "beta_slow", "attention_factor")},
    **{f"{name}?": float | None for name in ("mscale", "mscale_all_dim")},
}
LLAMA_FIELDS = {  # theirs: ours
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
LLAMA_TENSORS = {  # theirs: ours
    "embed_tokens.weight": "tokens",
    "layers.{layer}.input_layernorm.weight": "blocks/attention_norm/scale",
    "layers.{layer}.self_attn.q_proj.weight": "blocks/attention/query/kernel",
    "layers.{layer}.self_attn.k_proj.weight": "blocks/attention/key/kernel",
    "layers.{layer}.self_attn.v_proj.weight": "blocks/attention/value/kernel",
    "layers.{layer}.self_attn.o_proj.weight": "blocks/attention/out/kernel",
    "layers.{layer}.post_attention_layernorm.weight": "blocks/mlp_norm/scale",
    "layers.{layer}.mlp.gate_proj.weight": "blocks/mlp/gate/kernel",
    "layers.{layer}.mlp.up_proj.weight": "blocks/mlp/up/kernel",
    "layers.{layer}.mlp.down_proj.weight": "blocks/mlp/down/kernel",
    "norm.weight": "final_norm/scale",
    "lm_head.weight": "head",
}
QWEN3_TENSORS = LLAMA_TENSORS | {
    "layers.{layer}.self_attn.q_norm.weight": "blocks/attention/query_norm/scale",
    "layers.{layer}.self_attn.k_norm.weight": "blocks/attention/key_norm/scale",
}
# theirs: ours
ROPE_SCALING = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
LLAMA3_FACTORS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _llama_model_config(hf: dict) -> ModelConfig:
    require(hf, LLAMA_FIXED)
    if not set(hf.get("layer_types") or ()) <= {"full_attention"}:
        raise BadInput("config.json: layer_types other than full_attention are not supported")
    rope = check_json(hf.get("rope_parameters") or hf.get("rope_scaling") or {}, ROPE_SCHEMA)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_SCALING:
        raise BadInput(f"config.json: rope_type={kind!r} is not supported")
    if kind == "llama3":
        require(rope, LLAMA3_FACTORS)
    if kind == "yarn" and "factor" not in rope:
        raise BadInput("config.json: rope_type='yarn' needs a factor")
    original_len = hf["max_position_embeddings"] if kind == "yarn" else 8192
    heads = hf["num_attention_heads"]
    hf = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False} | hf
    hf["num_key_value_heads"] = hf.get("num_key_value_heads") or heads
    hf["head_dim"] = hf.get("head_dim") or hf["hidden_size"] // heads
    return ModelConfig(
        **{ours: hf[theirs] for theirs, ours in LLAMA_FIELDS.items()},
        norm="rmsnorm",
        position="rope",
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 1e4))),
        rope_scaling=ROPE_SCALING[kind],
        rope_factor=float(rope.get("factor", 1.0)),
        rope_original_len=rope.get("original_max_position_embeddings", original_len),
        **(_yarn_fields(rope) if kind == "yarn" else {}),
        activation="swiglu",
        bias=False,
        qk_norm=str(hf.get("model_type")).startswith("qwen3"),
    )


def _yarn_fields(rope: dict) -> dict[str, float]:
    """Returns the fields of YaRN; `mscale` and `mscale_all_dim` (DeepSeek's) say the attention
    factor where it is not given."""
    require(rope, {"truncate": True})
    given, scales = rope.get("attention_factor"), (rope.get("mscale"), rope.get("mscale_all_dim"))
    if given is None and all(scales):
        one, other = (attention_factor(rope.get("factor", 1.0), scale) for scale in scales)
        given = one / other
    return {
        "rope_beta_fast": float(rope.get("beta_fast") or 32),
        "rope_beta_slow": float(rope.get("beta_slow") or 1),
        "rope_attention_factor": float(given or 0),
    }


def _llama_hf_config(cfg: ModelConfig) -> dict:
    kind = {ours: theirs for theirs, ours in ROPE_SCALING.items()}[cfg.rope_scaling]
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": cfg.rope_theta}
    if kind != "default":
        rope["factor"] = cfg.rope_factor
    if kind == "llama3":
        rope |= LLAMA3_FACTORS | {"original_max_position_embeddings": cfg.rope_original_len}
    if kind == "yarn":
        rope |= {"original_max_position_embeddings": cfg.rope_original_len}
        rope |= {"beta_fast": cfg.rope_beta_fast, "beta_slow": cfg.rope_beta_slow}
        if cfg.rope_attention_factor:
            rope["attention_factor"] = cfg.rope_attention_factor
    return {
        "model_type": "qwen3" if cfg.qk_norm else "llama",
        **{theirs: getattr(cfg, ours) for theirs, ours in LLAMA_FIELDS.items()},
        **{key: LLAMA_FIXED[key] for key in ("hidden_act", "attention_bias", "mlp_bias")},
        "rope_parameters": rope,
        "rope_theta": cfg.rope_theta,  # this and the next: before transformers 5
        "rope_scaling": None if kind == "default" else rope,
    }


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    exact=COMMON
    | dict(norm=("rmsnorm",), position=("rope",), bias=(False,), qkv_bias=(False,))
    | dict(activation=("swiglu",), qk_norm=(False,)),
    rules=rules_from(LLAMA_TENSORS, transposed=True),
    model_config=_llama_model_config,
    hf_config=_llama_hf_config,
    schema=schema_of(LLAMA_FIELDS)
    | {"rope_theta?": float, "layer_types?": list | None}
    | {"rope_parameters?": dict | None, "rope_scaling?": dict | None},
    prefix="model.",
    ignored=("rotary_emb.inv_freq",),
)
QWEN3 = dataclasses.replace(
    LLAMA,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    exact=LLAMA.exact | {"qk_norm": (True,)},
    rules=rules_from(QWEN3_TENSORS, transposed=True),
)
