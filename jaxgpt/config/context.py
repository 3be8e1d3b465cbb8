"""Checks of a context that is split over devices, across fields."""

from jaxgpt.config.schema import Config
from jaxgpt.system.errors import BadInput

CACHE_BLOCK = 64  # a cache's slots are a multiple of this, so that few shapes are compiled
# Objectives that take every position alone; others pick some of a sequence
SPLIT = ("causal_lm", "prefix_lm", "fill_in_the_middle", "span_corruption", "seq2seq")


def check_context(config: Config, mesh: dict[str, int]) -> None:
    """Raises `BadInput` where `mesh.context` does not divide what it splits, or a part of the model
    needs whole sequences."""
    devices, model = mesh["context"], config.model
    if devices == 1:
        return
    here = f"mesh.context={devices}"
    if CACHE_BLOCK % devices:
        raise BadInput(f"{here} must divide {CACHE_BLOCK}, the slots of a block of a cache")
    # Under a causal mask each device has an early and a late chunk (see `ops.context.order`)
    for name, chunks in (("max_seq_len", 2 * devices), ("max_source_len", devices)):
        if (length := getattr(model, name)) % chunks:
            raise BadInput(
                f"model.{name}={length} cannot be cut into {chunks} chunks for {here}; make it a"
                f" multiple of {chunks}"
            )
    if config.objective not in SPLIT:
        raise BadInput(
            f"{here} with objective={config.objective}, which picks positions of whole sequences;"
            " set mesh.context=1"
        )
    if model.attention_pattern == "lsh":
        raise BadInput(
            f"{here} with model.attention_pattern=lsh, which sorts whole sequences; set"
            " mesh.context=1"
        )
    if config.compute.context_attention == "ring" and (why := needing_all_keys(config)):
        raise BadInput(
            f"compute.context_attention=ring with {why}, which needs all keys at once; set"
            " compute.context_attention=auto"
        )


def needing_all_keys(config: Config) -> str:
    """Returns the setting with which no layer could use a ring; "" where there is none."""
    model = config.model
    if model.attention_pattern != "full":
        return f"model.attention_pattern={model.attention_pattern}"
    if model.window and not model.full_attention_every:
        return f"model.window={model.window}"
    if model.dropout:
        return f"model.dropout={model.dropout}"
    if model.position == "relative":
        return "model.position=relative"
    return "objective=prefix_lm" if config.objective == "prefix_lm" else ""
