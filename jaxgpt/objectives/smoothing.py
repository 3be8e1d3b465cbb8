"""Label smoothing (arXiv:1512.00567, section 7): a share of each target spread over the
vocabulary."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config.schema import IGNORE
from jaxgpt.model.vocabulary import Vocabulary


def even_losses(
    vocabulary: Vocabulary,
    x: Float[Array, "B T D"],
    lse: Float[Array, "B T"],
    targets: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Returns the cross-entropy in nats of targets spread evenly over the vocabulary, 0 where the
    target is IGNORE: the logsumexp of the logits less their mean, which one row of the table gives,
    the mean of all."""
    v = vocabulary
    table = v.tokens if v.head is None else v.head
    mean = jnp.einsum("BTD,D->BT", v.transformed(x), v.storage.mean_row(table, v.size))
    if v.head_bias is not None:
        bias = v.head_bias[...]
        mean += jnp.sum(jnp.where(jnp.arange(len(bias)) < v.size, bias, 0)) / v.size
    return jnp.where(targets == IGNORE, 0, lse - v.scale * mean)
