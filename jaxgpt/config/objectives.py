"""What an objective asks of the model and the tokenizer, as far as the config says it."""

from jaxgpt.config.schema import Config
from jaxgpt.system.errors import BadInput

KINDS = {  # of model that an objective trains; those that are not here train any
    "causal_lm": "decoder",
    "distill": "decoder",
    "prefix_lm": "decoder",
    "fill_in_the_middle": "decoder",
    "masked_lm": "encoder",
    "masked_lm_nsp": "encoder",
    "span_corruption": "encoder_decoder",
    "seq2seq": "encoder_decoder",
}
SPECIAL_TOKENS = {  # that the tokenizer gets
    "masked_lm": "[MASK],[CLS],[SEP]",
    "masked_lm_nsp": "[MASK],[CLS],[SEP]",
    "span_corruption": "<extra_id_0..99>",
    "fill_in_the_middle": "<|fim_prefix|>,<|fim_suffix|>,<|fim_middle|>",
}


def check_kind(config: Config) -> None:
    """Raises `BadInput` where the objective trains another kind of model."""
    name, kind = config.objective, config.model.kind
    if kind == KINDS.get(name, kind):
        return
    fitting = [o for o, its in KINDS.items() if its == kind and o not in ("distill", "seq2seq")]
    raise BadInput(
        f"objective={name} needs model.kind={KINDS[name]}, not {kind}; of that kind"
        f" objective={' or '.join(fitting)} learns from text"
    )


def with_special_tokens(config: Config) -> str:
    """Returns `data.special_tokens` with those that the objective needs, but for a tokenizer of a
    model's folder, which has its own."""
    given, kind = config.data.special_tokens, config.data.tokenizer.partition(":")[0]
    if kind in ("", "hf") or config.objective not in SPECIAL_TOKENS:
        return given
    names = [name for name in given.split(",") if name]
    known = set(map(str.strip, names))
    needed = SPECIAL_TOKENS[config.objective].split(",")
    missing = [name for name in needed if name not in known]
    return ",".join([*names, *missing]) if missing else given
