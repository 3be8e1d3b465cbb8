"""What jaxgpt's models are called elsewhere: config fields and tensors of GPT-2, Llama, Qwen3."""

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
    """One tensor of theirs and the one or more of ours that it holds.

    `theirs` may contain {layer}; `turned`: theirs is [out, in] where ours is [in, out].
    Several of ours lie side by side along the output axis.
    """

    theirs: str
    ours: tuple[str, ...]
    turned: bool = False

    def give(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Returns their tensor of our arrays (of one layer)."""
        flat = [_matrix(path, a) for path, a in zip(self.ours, arrays, strict=True)]
        joined = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=-1)
        return joined.T if self.turned else joined

    def shape(self, shapes: list[tuple]) -> tuple:
        """Returns their tensor's shape, from ours (of one layer)."""
        flat = [_flat_shape(path, shape) for path, shape in zip(self.ours, shapes, strict=True)]
        found = (*flat[0][:-1], sum(shape[-1] for shape in flat))
        return found[::-1] if self.turned else found

    def take(self, tensor: np.ndarray, shapes: list[tuple]) -> list[np.ndarray]:
        """Returns our arrays, in `shapes`, out of their tensor; the inverse of `give`."""
        tensor = tensor.T if self.turned else tensor
        widths = [_flat_shape(path, s)[-1] for path, s in zip(self.ours, shapes, strict=True)]
        parts = np.split(tensor, np.cumsum(widths)[:-1], axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _flat_shape(path: str, shape: tuple) -> tuple:
    """Kernels become [in, out], biases and scales [out]; tables stay."""
    if path.endswith("/kernel") and path != "positions/kernel":
        inputs = 2 if path.endswith("out/kernel") else 1
        return (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
    return shape if path in ("tokens", "head", "positions/kernel") else (math.prod(shape),)


def _matrix(path: str, array: np.ndarray) -> np.ndarray:
    return array.reshape(_flat_shape(path, array.shape))


@dataclasses.dataclass(frozen=True)
class Family:
    """`exact` lists what our fields must be for the architectures to be the same; `config` and
    `model` translate the rest, `schema` is what `model` reads (see `config.files.parse_json`);
    `prefix` may be missing in their names, `ignored` may be there."""

    name: str
    architecture: str
    exact: dict[str, tuple]
    rules: tuple[Rule, ...]
    model: Callable[[dict], ModelConfig]
    config: Callable[[ModelConfig], dict]
    schema: dict
    prefix: str = ""
    ignored: tuple[str, ...] = ()

    def differences(self, cfg: ModelConfig) -> list[str]:
        """Returns what keeps `cfg` from being of this family: `model.norm='rmsnorm'`, ..."""
        cfg = cfg.with_sizes()
        return [
            f"model.{field}={getattr(cfg, field)!r}"
            for field, allowed in self.exact.items()
            if getattr(cfg, field) not in allowed
        ]

    def rules_of(self, paths) -> list[Rule]:
        """Returns the rules for a model with these parameters (biases, head as there are).

        Raises:
          BadInput: if a parameter has no place in their layout.
        """
        rules = [rule for rule in self.rules if set(rule.ours) <= set(paths)]
        if missing := set(paths) - {path for rule in rules for path in rule.ours}:
            raise BadInput(f"{self.name} has no tensor for {', '.join(sorted(missing))}")
        return rules


def _block(name: str, path: str, turned: bool = False, *more: str) -> Rule:
    return Rule(name, tuple(f"blocks/{p}" for p in (path, *more)), turned)


GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}
GPT2_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
GPT2_SCHEMA = {
    **{name: int for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
    **{"n_positions?": int, "n_ctx?": int, "n_inner?": int | None},
    **{"activation_function?": str, "layer_norm_epsilon?": float, "tie_word_embeddings?": bool},
}


def _gpt2_model(hf: dict) -> ModelConfig:
    _require(hf, GPT2_FIXED)
    activation = hf.get("activation_function", "gelu_new")
    if activation not in GPT2_ACTIVATIONS:
        raise BadInput(f"config.json: activation_function={activation!r} is not supported")
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        max_seq_len=hf.get("n_positions", hf.get("n_ctx")),
        num_layers=hf["n_layer"],
        num_heads=hf["n_head"],
        embed_dim=hf["n_embd"],
        mlp_dim=hf.get("n_inner") or 4 * hf["n_embd"],
        activation=GPT2_ACTIVATIONS[activation],
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def _gpt2_config(cfg: ModelConfig) -> dict:
    names = {ours: theirs for theirs, ours in GPT2_ACTIVATIONS.items()}
    return {
        "model_type": "gpt2",
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.max_seq_len,
        "n_ctx": cfg.max_seq_len,
        "n_layer": cfg.num_layers,
        "n_head": cfg.num_heads,
        "n_embd": cfg.embed_dim,
        "n_inner": cfg.mlp_dim,
        "activation_function": names[cfg.activation],
        "layer_norm_epsilon": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": cfg.dropout,
    }


COMMON = {
    "norm_position": ("pre",),
    "window": (0,),
    "logit_softcap": (0.0,),
    "mup_base_width": (0,),
    "scale_embeddings": (False,),
}
QKV = tuple(f"attention/{name}" for name in ("query", "key", "value"))
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    COMMON
    | {
        "norm": ("layernorm",),
        "position": ("learned",),
        "bias": (True,),
        "qk_norm": (False,),
        "activation": tuple(GPT2_ACTIVATIONS.values()),
    },
    (
        Rule("wte.weight", ("tokens",)),
        Rule("wpe.weight", ("positions/kernel",)),
        *(
            rule
            for end, suffix in (("kernel", "weight"), ("bias", "bias"))
            for rule in (
                _block(
                    f"h.{{layer}}.attn.c_attn.{suffix}",
                    *[f"{QKV[0]}/{end}"],
                    False,
                    *[f"{path}/{end}" for path in QKV[1:]],
                ),
                _block(f"h.{{layer}}.attn.c_proj.{suffix}", f"attention/out/{end}"),
                _block(f"h.{{layer}}.mlp.c_fc.{suffix}", f"mlp/up/{end}"),
                _block(f"h.{{layer}}.mlp.c_proj.{suffix}", f"mlp/down/{end}"),
            )
        ),
        *(
            rule
            for end, suffix in (("scale", "weight"), ("bias", "bias"))
            for rule in (
                _block(f"h.{{layer}}.ln_1.{suffix}", f"attention_norm/{end}"),
                _block(f"h.{{layer}}.ln_2.{suffix}", f"mlp_norm/{end}"),
                Rule(f"ln_f.{suffix}", (f"final_norm/{end}",)),
            )
        ),
        Rule("lm_head.weight", ("head",)),
    ),
    _gpt2_model,
    _gpt2_config,
    GPT2_SCHEMA,
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
)

LLAMA_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "pretraining_tp": 1,
}
LLAMA_SCHEMA = {
    **{name: int for name in ("vocab_size", "hidden_size", "intermediate_size")},
    **{name: int for name in ("num_hidden_layers", "num_attention_heads")},
    **{"max_position_embeddings": int, "num_key_value_heads?": int | None, "head_dim?": int | None},
    **{"rms_norm_eps?": float, "rope_theta?": float, "tie_word_embeddings?": bool},
    **{"layer_types?": list | None, "rope_parameters?": dict | None, "rope_scaling?": dict | None},
}
ROPE_SCHEMA = {
    **{"rope_type?": str, "type?": str, "rope_theta?": float, "factor?": float},
    "original_max_position_embeddings?": int,
}


def _llama_model(hf: dict) -> ModelConfig:
    _require(hf, LLAMA_FIXED)
    if not set(hf.get("layer_types") or ()) <= {"full_attention"}:
        raise BadInput("config.json: layer_types other than full_attention are not supported")
    rope = check_json(hf.get("rope_parameters") or hf.get("rope_scaling") or {}, ROPE_SCHEMA)
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {"default": "none", "linear": "linear", "llama3": "llama3"}.get(kind)
    if scaling is None:
        raise BadInput(f"config.json: rope_type={kind!r} is not supported")
    if scaling == "llama3":
        _require(rope, {"low_freq_factor": 1.0, "high_freq_factor": 4.0})
    heads = hf["num_attention_heads"]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        embed_dim=hf["hidden_size"],
        mlp_dim=hf["intermediate_size"],
        norm="rmsnorm",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        position="rope",
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 1e4))),
        rope_scaling=scaling,
        rope_factor=float(rope.get("factor", 1.0)),
        rope_original_len=rope.get("original_max_position_embeddings", 8192),
        activation="swiglu",
        bias=False,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qk_norm=hf.get("model_type") == "qwen3",
    )


def _llama_config(cfg: ModelConfig) -> dict:
    kind = {"none": "default"}.get(cfg.rope_scaling, cfg.rope_scaling)
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling != "none":
        rope["factor"] = cfg.rope_factor
    if cfg.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": cfg.rope_original_len,
        }
    old = {"rope_theta": cfg.rope_theta, "rope_scaling": None if kind == "default" else rope}
    return {
        "model_type": "qwen3" if cfg.qk_norm else "llama",
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_seq_len,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_size": cfg.embed_dim,
        "intermediate_size": cfg.mlp_dim,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_parameters": rope,
    } | old


def _modern(name: str, architecture: str, qk_norm: bool) -> Family:
    norms = tuple(
        _block(f"layers.{{layer}}.self_attn.{short}_norm.weight", f"attention/{long}_norm/scale")
        for short, long in (("q", "query"), ("k", "key"))
    )
    kernels = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
    return Family(
        name,
        architecture,
        COMMON
        | {
            "norm": ("rmsnorm",),
            "position": ("rope",),
            "bias": (False,),
            "qkv_bias": (False,),
            "activation": ("swiglu",),
            "qk_norm": (qk_norm,),
        },
        (
            Rule("model.embed_tokens.weight", ("tokens",)),
            *(
                _prefixed(
                    _block(
                        f"layers.{{layer}}.self_attn.{short}_proj.weight",
                        f"attention/{long}/kernel",
                        True,
                    )
                )
                for short, long in kernels
            ),
            *(
                _prefixed(_block(f"layers.{{layer}}.mlp.{n}_proj.weight", f"mlp/{n}/kernel", True))
                for n in ("gate", "up", "down")
            ),
            *map(_prefixed, norms if qk_norm else ()),
            _prefixed(_block("layers.{layer}.input_layernorm.weight", "attention_norm/scale")),
            _prefixed(_block("layers.{layer}.post_attention_layernorm.weight", "mlp_norm/scale")),
            Rule("model.norm.weight", ("final_norm/scale",)),
            Rule("lm_head.weight", ("head",)),
        ),
        _llama_model,
        _llama_config,
        LLAMA_SCHEMA,
        ignored=("rotary_emb.inv_freq",),
    )


def _prefixed(rule: Rule) -> Rule:
    return dataclasses.replace(rule, theirs=f"model.{rule.theirs}")


LLAMA = _modern("llama", "LlamaForCausalLM", False)
QWEN3 = _modern("qwen3", "Qwen3ForCausalLM", True)
FAMILIES = {family.name: family for family in (GPT2, LLAMA, QWEN3)}


def _require(hf: dict, fixed: dict) -> None:
    for key, value in fixed.items():
        if key in hf and hf[key] != value:
            raise BadInput(f"config.json: {key}={hf[key]!r} is not supported, only {value!r}")


def family_of(cfg: ModelConfig) -> Family:
    """Returns the family whose architecture is exactly the config's.

    Raises:
      BadInput: naming the fields that no family has so.
    """
    found = {name: family.differences(cfg) for name, family in FAMILIES.items()}
    for name, differences in found.items():
        if not differences:
            return FAMILIES[name]
    name, differences = min(found.items(), key=lambda item: len(item[1]))
    raise BadInput(
        f"no Hugging Face architecture is exactly this model: the nearest, {name}, has not"
        f" {', '.join(differences)}"
    )
