"""Embeddings on their way from the devices of their columns to the devices of their rows."""

import jax
from jax.sharding import PartitionSpec as P

from jaxgpt.parallel.collectives import columns_to_rows
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parallel.specs import names


def embed_columns_to_rows(x: jax.Array, rules: AxisRules) -> jax.Array:
    """Returns looked-up embeddings [B, T, D] as the residual stream has them, each device with all
    columns of its own rows, from each device's own columns of all rows: an all-to-all.

    Axes trade the last first, so that columns come in order; rows then are in order only if
    `BATCH_AXES` names the same axes the other way round.
    """
    out = rules("batch", "residual", None)
    if not rules.split_batch:  # every device has all rows
        return jax.sharding.reshard(x, out)

    def local(x):
        return columns_to_rows(x, rules.torus)

    given = rules("lookup_batch", "lookup_seq", "embed")
    # Positions that are split already are split further
    traded = P(out[0], (*names(given[1]), *names(rules("seq")[0])) or None, None)
    run = jax.shard_map(local, in_specs=given, out_specs=traded)
    return jax.sharding.reshard(run(jax.sharding.reshard(x, given)), out)
