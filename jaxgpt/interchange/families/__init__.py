"""The architectures of Hugging Face's that jaxgpt can also express, a file each."""

from jaxgpt.config import ModelConfig
from jaxgpt.interchange.families.bart import BART
from jaxgpt.interchange.families.bert import BERT, ROBERTA
from jaxgpt.interchange.families.family import Family, Rule
from jaxgpt.interchange.families.gpt2 import GPT2
from jaxgpt.interchange.families.llama import LLAMA, QWEN3
from jaxgpt.interchange.families.mixtures import MIXTRAL, QWEN3_MOE
from jaxgpt.interchange.families.t5 import T5
from jaxgpt.system.errors import BadInput

__all__ = ["FAMILIES", "GPT2", "LATENT", "Family", "Rule", "family_of"]

ALL = (GPT2, LLAMA, QWEN3, MIXTRAL, QWEN3_MOE, BERT, ROBERTA, T5, BART)
LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2")  # with multi-head latent attention
FAMILIES = {family.name: family for family in ALL}


def family_of(cfg: ModelConfig) -> Family:
    """Returns the family that computes exactly what a model of this config does. Raises `BadInput`
    if there is none; it names the fields in which the nearest family differs."""

    def distance(family: Family) -> tuple:
        is_other = cfg.num_experts not in family.exact["num_experts"]  # a mixture, or not one
        return is_other, len(family.differences(cfg))

    nearest = min(FAMILIES.values(), key=distance)
    if differences := nearest.differences(cfg):
        raise BadInput(
            "no Hugging Face architecture computes exactly what this model does: the nearest,"
            f" {nearest.name}, does not support {', '.join(differences)}"
        )
    return nearest
