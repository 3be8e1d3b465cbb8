"""GPT-2, Llama and Qwen3 as Hugging Face stores them: their config fields and tensors, and ours."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import check_json


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of theirs and the parameters of ours that it contains.

    `theirs` may contain {layer}. Several of ours are concatenated along the output axis.
    `transposed`: theirs is [out, in] where ours is [in, out].
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool

    def to_theirs(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Returns their tensor, made of our arrays (of one layer)."""
        matrices = [a.reshape(_matrix_shape(p, a.shape)) for p, a in zip(self.ours, arrays)]
        joined = matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=-1)
        return joined.T if self.transposed else joined

    def shape(self, shapes: list[tuple]) -> tuple:
        """Returns their tensor's shape, from our shapes (of one layer)."""
        matrices = [_matrix_shape(path, shape) for path, shape in zip(self.ours, shapes)]
        joined = (*matrices[0][:-1], sum(shape[-1] for shape in matrices))
        return joined[::-1] if self.transposed else joined

    def to_ours(self, tensor: np.ndarray, shapes: list[tuple]) -> list[np.ndarray]:
        """Returns our arrays, in `shapes`, from their tensor; the inverse of `to_theirs`."""
        tensor = tensor.T if self.transposed else tensor
        widths = [_matrix_shape(path, shape)[-1] for path, shape in zip(self.ours, shapes)]
        matrices = np.split(tensor, np.cumsum(widths)[:-1], axis=-1)
        return [matrix.reshape(shape) for matrix, shape in zip(matrices, shapes)]


def _matrix_shape(path: str, shape: tuple) -> tuple:
    """Returns a kernel's shape as [in, out], a bias's or scale's as [out], a table's unchanged."""
    if path in ("tokens", "head", "positions/kernel"):
        return shape
    if not path.endswith("/kernel"):
        return (math.prod(shape),)
    inputs = 2 if path.endswith("out/kernel") else 1
    return (math.prod(shape[:inputs]), math.prod(shape[inputs:]))


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of Hugging Face's that jaxgpt can also express.

    `exact` lists the values our fields must have for the two to compute the same; `model_config`
    and `hf_config` translate the other fields, `schema` describes what `model_config` reads (see
    `system.files.parse_json`). Their tensors' names may start with `prefix`; tensors whose names
    end with one of `ignored` are skipped.
    """

    name: str
    architecture: str
    exact: dict[str, tuple]
    rules: tuple[Rule, ...]
    model_config: Callable[[dict], ModelConfig]
    hf_config: Callable[[ModelConfig], dict]
    schema: dict
    prefix: str
    ignored: tuple[str, ...]
    equal_heads: bool = False  # no key heads apart, and all heads together as wide as the embedding

    def differences(self, cfg: ModelConfig) -> list[str]:
        """Returns what keeps `cfg` from being of this family: `model.norm='rmsnorm'`, ..."""
        different = [
            f"model.{field}={getattr(cfg, field)!r}"
            for field, allowed in self.exact.items()
            if getattr(cfg, field) not in allowed
        ]
        heads, width = (cfg.num_heads, cfg.num_kv_heads), cfg.num_heads * cfg.head_dim
        if self.equal_heads and (heads[0] != heads[1] or width != cfg.embed_dim):
            different.append(
                f"model.num_heads={heads[0]}, num_kv_heads={heads[1]} of head_dim={cfg.head_dim}"
                f" in embed_dim={cfg.embed_dim}"
            )
        return different

    def rules_of(self, paths) -> list[Rule]:
        """Returns the rules for a model with these parameters: biases and a head are optional.
        Raises `BadInput` if this family has no tensor for a parameter."""
        rules = [rule for rule in self.rules if set(rule.ours) <= set(paths)]
        if missing := set(paths) - {path for rule in rules for path in rule.ours}:
            raise BadInput(f"{self.name} has no tensor for {', '.join(sorted(missing))}")
        return rules


def _rules(tensors: dict[str, str], transposed: bool) -> tuple[Rule, ...]:
    """Returns the rules of a table from their names to ours; `transposed`: kernels [out, in]."""
    return tuple(
        Rule(theirs, tuple(ours.split()), transposed and ours.endswith("/kernel"))
        for theirs, ours in tensors.items()
    )


def _schema(fields: dict[str, str]) -> dict:
    """Returns the types of their config's fields, which are those of ours; null: not given."""
    kinds = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    return {f"{theirs}?": kinds[ours] | None for theirs, ours in fields.items()}


COMMON = dict(norm_position=("pre",), window=(0,), logit_softcap=(0.0,), mup_base_width=(0,))
COMMON |= dict(scale_embeddings=(False,))

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
    _require(hf, GPT2_FIXED)
    activation = hf.get("activation_function", "gelu_new")
    if activation not in GPT2_ACTIVATIONS:
        raise BadInput(f"config.json: activation_function={activation!r} is not supported")
    defaults = {"n_positions": hf.get("n_ctx"), "layer_norm_epsilon": 1e-5}
    hf = defaults | {"tie_word_embeddings": True} | hf
    hf["n_inner"] = hf.get("n_inner") or 4 * hf["n_embd"]
    fields = {ours: hf[theirs] for theirs, ours in GPT2_FIELDS.items()}
    return ModelConfig(**fields, activation=GPT2_ACTIVATIONS[activation])


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
    rules=_rules(GPT2_TENSORS, transposed=False),
    model_config=_gpt2_model_config,
    hf_config=_gpt2_hf_config,
    schema=_schema(GPT2_FIELDS) | {"n_ctx?": int, "activation_function?": str},
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
    equal_heads=True,
)

LLAMA_FIXED = dict(hidden_act="silu", attention_bias=False, mlp_bias=False)
LLAMA_FIXED |= dict(use_sliding_window=False, pretraining_tp=1)
ROPE_SCHEMA = {
    **{"rope_type?": str, "type?": str, "rope_theta?": float, "factor?": float},
    "original_max_position_embeddings?": int,
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
ROPE_SCALING = {"default": "none", "linear": "linear", "llama3": "llama3"}  # theirs: ours
LLAMA3_FACTORS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _llama_model_config(hf: dict) -> ModelConfig:
    _require(hf, LLAMA_FIXED)
    if not set(hf.get("layer_types") or ()) <= {"full_attention"}:
        raise BadInput("config.json: layer_types other than full_attention are not supported")
    rope = check_json(hf.get("rope_parameters") or hf.get("rope_scaling") or {}, ROPE_SCHEMA)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_SCALING:
        raise BadInput(f"config.json: rope_type={kind!r} is not supported")
    if kind == "llama3":
        _require(rope, LLAMA3_FACTORS)
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
        rope_original_len=rope.get("original_max_position_embeddings", 8192),
        activation="swiglu",
        bias=False,
        qk_norm=hf.get("model_type") == "qwen3",
    )


def _llama_hf_config(cfg: ModelConfig) -> dict:
    kind = {ours: theirs for theirs, ours in ROPE_SCALING.items()}[cfg.rope_scaling]
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": cfg.rope_theta}
    if kind != "default":
        rope["factor"] = cfg.rope_factor
    if kind == "llama3":
        rope |= LLAMA3_FACTORS | {"original_max_position_embeddings": cfg.rope_original_len}
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
    rules=_rules(LLAMA_TENSORS, transposed=True),
    model_config=_llama_model_config,
    hf_config=_llama_hf_config,
    schema=_schema(LLAMA_FIELDS)
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
    rules=_rules(QWEN3_TENSORS, transposed=True),
)
FAMILIES = {family.name: family for family in (GPT2, LLAMA, QWEN3)}


def _require(hf: dict, fixed: dict) -> None:
    for key, value in fixed.items():
        if key in hf and hf[key] != value:
            raise BadInput(f"config.json: {key}={hf[key]!r} is not supported, only {value!r}")


def family_of(cfg: ModelConfig) -> Family:
    """Returns the family that computes exactly what a model of this config does. Raises `BadInput`
    if there is none; it names the fields in which the nearest family differs."""
    nearest = min(FAMILIES.values(), key=lambda family: len(family.differences(cfg)))
    if differences := nearest.differences(cfg):
        raise BadInput(
            "no Hugging Face architecture computes exactly what this model does: the nearest,"
            f" {nearest.name}, does not support {', '.join(differences)}"
        )
    return nearest
