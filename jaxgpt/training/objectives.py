"""The objectives by name: the function that training minimises, and what a run needs besides."""

from collections.abc import Callable

from jaxgpt.config import Config
from jaxgpt.denoising.companions import TASKS, OnCorruptedText
from jaxgpt.denoising.objective import masked_lm, masked_lm_nsp
from jaxgpt.distillation.objective import distill
from jaxgpt.distillation.teacher import Teacher
from jaxgpt.labelled import heads
from jaxgpt.labelled.companions import OnRows
from jaxgpt.objectives.companions import Companions
from jaxgpt.objectives.language import causal_lm

OBJECTIVES: dict[str, Callable[[Config], Callable]] = {
    "causal_lm": causal_lm,
    "distill": distill,
    "masked_lm": masked_lm,
    "masked_lm_nsp": masked_lm_nsp,
    "span_corruption": causal_lm,
    "prefix_lm": causal_lm,
    "fill_in_the_middle": causal_lm,
    "seq2seq": causal_lm,
    "classification": heads.classification,
    "token_classification": heads.token_classification,
    "span_qa": heads.span_qa,
}
COMPANIONS: dict[str, type[Companions]] = {
    "distill": Teacher,
    **dict.fromkeys(TASKS, OnCorruptedText),
    "seq2seq": OnRows,
    "classification": OnRows,
    "token_classification": OnRows,
    "span_qa": OnRows,
}


def companions_of(objective: str) -> type[Companions]:
    """Returns the class of what an objective needs besides its function."""
    return COMPANIONS.get(objective, Companions)
