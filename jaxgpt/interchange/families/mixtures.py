"""Mixtral and Qwen3-MoE as Hugging Face stores them: Llama and Qwen3 with mixtures of experts.

Their balance loss is ours for one mixture: of several they multiply the means over all layers,
where we take the mean over layers of each one's product.
"""

import dataclasses

from jaxgpt.config import ModelConfig
from jaxgpt.interchange.families.family import require, rules_from, schema_of
from jaxgpt.interchange.families.llama import LLAMA, LLAMA_TENSORS, QWEN3, QWEN3_TENSORS
from jaxgpt.system.errors import BadInput

FIELDS = {"num_experts_per_tok": "experts_per_token", "router_aux_loss_coef": "balance_loss"}
MIXTRAL_FIELDS = FIELDS | {"num_local_experts": "num_experts"}
MIXTRAL_DEFAULTS = dict(num_experts_per_tok=2, router_aux_loss_coef=0.001, num_local_experts=8)
QWEN3_FIELDS = FIELDS | {
    "num_experts": "num_experts",
    "moe_intermediate_size": "expert_dim",
    "norm_topk_prob": "normalize_gates",
    "decoder_sparse_step": "expert_every",
}
QWEN3_DEFAULTS = dict(num_experts_per_tok=8, router_aux_loss_coef=0.001, norm_topk_prob=False)
QWEN3_DEFAULTS |= dict(num_experts=128, moe_intermediate_size=768, decoder_sparse_step=1)
MIXTRAL_FIXED = dict(sliding_window=None, router_jitter_noise=0.0)
# What every mixture of theirs has
EXACT = dict(num_experts=range(1, 1 << 16), router=("softmax_topk",), shared_experts=(0,))
EXACT |= dict(gate_scale=(1.0,), expert_capacity=(0.0,))


def _tensors(module: str, gate: str, up: str, down: str) -> dict[str, str]:
    """Returns the names of a mixture's tensors and ours."""
    named = {gate: "gate", up: "up", down: "down"}
    return {f"layers.{{layer}}.{module}.gate.weight": "blocks/mlp/router/kernel"} | {
        f"layers.{{layer}}.{module}.experts.{{expert}}.{theirs}.weight": (
            f"blocks/mlp/experts/{ours}/kernel"
        )
        for theirs, ours in named.items()
    }


def _given(hf: dict, fields: dict[str, str], defaults: dict) -> dict:
    hf = defaults | {name: value for name, value in hf.items() if value is not None}
    return {ours: hf[theirs] for theirs, ours in fields.items()}


def _mixtral_model_config(hf: dict) -> ModelConfig:
    require(hf, MIXTRAL_FIXED)
    cfg = LLAMA.model_config({"rope_theta": 1e6} | hf)
    mixture = _given(hf, MIXTRAL_FIELDS, MIXTRAL_DEFAULTS)
    return dataclasses.replace(cfg, **mixture, expert_dim=cfg.mlp_dim)


def _qwen3_model_config(hf: dict) -> ModelConfig:
    if "num_local_experts" in hf:  # as transformers 5 writes it
        hf = {"num_experts": hf["num_local_experts"]} | hf
    cfg = QWEN3.model_config(hf)
    cfg = dataclasses.replace(cfg, **_given(hf, QWEN3_FIELDS, QWEN3_DEFAULTS))
    dense = hf.get("mlp_only_layers") or []
    mixtures = [i for i in cfg.mixture_layers if i not in dense]
    for first in range(cfg.num_layers) if mixtures else ():
        found = dataclasses.replace(cfg, first_dense_layers=first)
        divides = (cfg.num_layers - first) % cfg.expert_every == 0
        if divides and list(found.mixture_layers) == mixtures:
            return found
    raise BadInput(
        f"config.json: mlp_only_layers={dense!r} with decoder_sparse_step={cfg.expert_every} is not"
        " supported, only dense layers at the start and then a repeating pattern"
    )


def _written(cfg: ModelConfig, fields: dict[str, str]) -> dict:
    return {theirs: getattr(cfg, ours) for theirs, ours in fields.items()}


def _mixtral_hf_config(cfg: ModelConfig) -> dict:
    own = {"model_type": "mixtral", "intermediate_size": cfg.expert_dim}
    return LLAMA.hf_config(cfg) | _written(cfg, MIXTRAL_FIELDS) | MIXTRAL_FIXED | own


def _qwen3_hf_config(cfg: ModelConfig) -> dict:
    own = {"model_type": "qwen3_moe", "mlp_only_layers": list(range(cfg.first_dense_layers))}
    return QWEN3.hf_config(cfg) | _written(cfg, QWEN3_FIELDS) | own


MIXTRAL = dataclasses.replace(
    LLAMA,
    name="mixtral",
    architecture="MixtralForCausalLM",
    exact=LLAMA.exact
    | EXACT
    | dict(expert_every=(1,), first_dense_layers=(0,), normalize_gates=(True,)),
    rules=rules_from(
        LLAMA_TENSORS | _tensors("block_sparse_moe", "w1", "w3", "w2"), transposed=True
    ),
    model_config=_mixtral_model_config,
    hf_config=_mixtral_hf_config,
    schema=LLAMA.schema | schema_of(MIXTRAL_FIELDS),
)
QWEN3_MOE = dataclasses.replace(
    QWEN3,
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    exact=QWEN3.exact | EXACT,
    rules=rules_from(
        QWEN3_TENSORS | _tensors("mlp", "gate_proj", "up_proj", "down_proj"), transposed=True
    ),
    model_config=_qwen3_model_config,
    hf_config=_qwen3_hf_config,
    schema=QWEN3.schema
    | schema_of(QWEN3_FIELDS)
    | {"mlp_only_layers?": list | None, "num_local_experts?": int},
)
