"""The auxiliary losses of a model's layers, as part of an objective."""

from jaxtyping import Array, Float, Num


def with_auxiliary(
    total: Float[Array, ""], count: Num[Array, ""], metrics: dict, figures: dict
) -> tuple:
    """Returns an objective's result with what `GPT.hidden` returned besides: "auxiliary_loss" is
    added to the loss, the other figures to the metrics. They are means over the microbatch, so
    those of several are averaged by what counts in each."""
    named = {name: count * figure for name, figure in figures.items()}
    return total + named.pop("auxiliary_loss", 0), count, metrics | named
