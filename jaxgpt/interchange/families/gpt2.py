"""GPT-2 (OpenAI 2019) as Hugging Face stores it."""

from jaxgpt.config import ModelConfig
from jaxgpt.interchange.families.family import (
    COMMON,
    Family,
    activation_of,
    require,
    rules_from,
    schema_of,
)

GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}
GPT2_FIXED = dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
GPT2_FIXED |= dict(reorder_and_upcast_attn=False, add_cross_attention=False)
GPT2_FIELDS = {  # theirs: ours
    "vocab_size": "vocab_size",
    "n_positions": "max_seq_len",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "embed_dim",
    "n_inner": "mlp_dim",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
QKV = "blocks/attention/query/{0} blocks/attention/key/{0} blocks/attention/value/{0}"
GPT2_TENSORS = {  # theirs: ours, separated by spaces
    "wte.weight": "tokens",
    "wpe.weight": "positions/kernel",
    "h.{layer}.ln_1.weight": "blocks/attention_norm/scale",
    "h.{layer}.ln_1.bias": "blocks/attention_norm/bias",
    "h.{layer}.attn.c_attn.weight": QKV.format("kernel"),
    "h.{layer}.attn.c_attn.bias": QKV.format("bias"),
    "h.{layer}.attn.c_proj.weight": "blocks/attention/out/kernel",
    "h.{layer}.attn.c_proj.bias": "blocks/attention/out/bias",
    "h.{layer}.ln_2.weight": "blocks/mlp_norm/scale",
    "h.{layer}.ln_2.bias": "blocks/mlp_norm/bias",
    "h.{layer}.mlp.c_fc.weight": "blocks/mlp/up/kernel",
    "h.{layer}.mlp.c_fc.bias": "blocks/mlp/up/bias",
    "h.{layer}.mlp.c_proj.weight": "blocks/mlp/down/kernel",
    "h.{layer}.mlp.c_proj.bias": "blocks/mlp/down/bias",
    "ln_f.weight": "final_norm/scale",
    "ln_f.bias": "final_norm/bias",
    "lm_head.weight": "head",
}


def _gpt2_model_config(hf: dict) -> ModelConfig:
    require(hf, GPT2_FIXED)
    activation = activation_of(hf, "activation_function", "gelu_new", GPT2_ACTIVATIONS)
    defaults = {"n_positions": hf.get("n_ctx"), "layer_norm_epsilon": 1e-5}
    hf = defaults | {"tie_word_embeddings": True} | hf
    hf["n_inner"] = hf.get("n_inner") or 4 * hf["n_embd"]
    fields = {ours: hf[theirs] for theirs, ours in GPT2_FIELDS.items()}
    return ModelConfig(**fields, activation=activation)


def _gpt2_hf_config(cfg: ModelConfig) -> dict:
    activations = {ours: theirs for theirs, ours in GPT2_ACTIVATIONS.items()}
    fields = {theirs: getattr(cfg, ours) for theirs, ours in GPT2_FIELDS.items()}
    fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg.dropout)
    activation = {"activation_function": activations[cfg.activation]}
    return {"model_type": "gpt2", "n_ctx": cfg.max_seq_len} | fields | activation


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    exact=COMMON
    | dict(norm=("layernorm",), position=("learned",), bias=(True,), qk_norm=(False,))
    | dict(activation=tuple(GPT2_ACTIVATIONS.values())),
    rules=rules_from(GPT2_TENSORS, transposed=False),
    model_config=_gpt2_model_config,
    hf_config=_gpt2_hf_config,
    schema=schema_of(GPT2_FIELDS) | {"n_ctx?": int, "activation_function?": str},
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
    equal_heads=True,
)
