"""Tokens to their experts and back, on one device or on the devices of the mesh axis `expert`.

Everything here runs inside `shard_map`, on one device's tokens.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config.schema import MESH_AXES
from jaxgpt.model.experts.feed_forward import FeedForward, Weights
from jaxgpt.model.experts.grouped import Groups, block_size, collect, group, on_tpu, places, spread
from jaxgpt.parallel.collectives import all_gather

BUFFER_MULTIPLE = 8  # rows of a TPU's tile


def mix(
    x: Float[Array, "N D"],
    ids: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    weights: Weights,
    feed_forward: FeedForward,
) -> Float[Array, "N D"]:
    """Returns the sum over each token's experts of gate times expert, of the experts that are here;
    ids from their number on have none."""
    experts, k = len(weights["down"]), ids.shape[1]
    block = block_size(ids.size, experts)
    at = group(ids.reshape(-1), experts, block)
    rows = feed_forward(spread(x, at, k), _spread_gates(gates, at), weights, at.sizes, block)
    return _summed(collect(rows, at), k)


def _spread_gates(gates: Float[Array, "..."], at: Groups) -> Float[Array, "P"]:
    return spread(gates.reshape(-1, 1), at, 1)[:, 0]


def _summed(choices: Float[Array, "M D"], k: int) -> Float[Array, "N D"]:
    """Returns the sum over the k choices of each token."""
    choices = choices.reshape(-1, k, choices.shape[1])
    return jnp.sum(choices, axis=1, dtype=jnp.float32).astype(choices.dtype)


def mix_where_they_are(x, ids, gates, weights, feed_forward) -> Float[Array, "N D"]:
    """Returns `mix` over all experts of tokens that every device has, without gathering a matrix:
    each multiplies by its part of those that it holds and the tokens chose."""
    own = ids - jax.lax.axis_index("expert") * (here := len(weights["down"]))
    own = jnp.where((own >= 0) & (own < here), own, here)
    width, k, over = weights["up"].shape[1], ids.shape[1], feed_forward.over
    device = jax.lax.axis_index(over) if over else 0
    columns = jax.lax.dynamic_slice_in_dim(x, device * width, width, axis=1)
    block = block_size(ids.size, here)
    at = group(own.reshape(-1), here, block)
    scales = _spread_gates(gates, at)
    rows = feed_forward.of_columns(spread(columns, at, k), scales, weights, at.sizes, block)
    y = jax.lax.psum(_summed(collect(rows, at), k), "expert")
    return all_gather(y, 1, feed_forward.torus, over)


def mix_over_devices(
    x: Float[Array, "N D"],
    ids: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    weights: Weights,
    feed_forward: FeedForward,
    buffer: float,
) -> Float[Array, "N D"]:
    """Returns `mix` over all experts, whose tokens travel to them and back (all-to-all).

    Every device sends `buffer` times the mean to each. What is over goes in further rounds, as many
    as the fullest needs: nothing is dropped, and memory does not grow with the imbalance. For the
    backward pass nothing is kept but the arguments.
    """
    devices = jax.lax.axis_size("expert")
    mean = ids.size / devices
    room = -(-math.ceil(buffer * mean) // BUFFER_MULTIPLE) * BUFFER_MULTIPLE
    room = min(room, ids.size)

    def one_round(number, ids, x, gates, weights):
        return _send_and_return(number, ids, x, gates, weights, feed_forward, room)

    @jax.custom_vjp
    def rounds(ids, x, gates, weights):
        return _sum(lambda n: one_round(n, ids, x, gates, weights), _rounds(ids))

    def _rounds(ids):
        here = len(weights["down"])
        destinations = (ids // here).reshape(-1)[:, None] == jnp.arange(devices)
        needed = -(-jnp.max(jnp.sum(destinations, axis=0)) // room)
        return jax.lax.pmax(needed, tuple(MESH_AXES))  # all devices take part in all rounds

    def backward(saved, grad):
        ids, *given = saved

        def of_round(number):
            return jax.vjp(lambda *given: one_round(number, ids, *given), *given)[1](grad)

        return None, *_sum(of_round, _rounds(ids))

    rounds.defvjp(lambda *given: (rounds(*given), given), backward)
    return rounds(ids, x, gates, weights)


def _sum(of_round: Callable, rounds: Int[Array, ""]):
    """Returns the sum of `of_round(n)` for n from 0 on. One loop for the first round, which is
    mostly the only one, and further ones: the program has each round's code once."""

    def add(carry):
        number, total = carry
        return number + 1, jax.tree.map(jnp.add, total, of_round(number))

    number = jnp.int32(0)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(of_round, number))
    return jax.lax.while_loop(lambda carry: carry[0] < rounds, add, (number, zeros))[1]


def _send_and_return(
    number, ids, x, gates, weights, feed_forward, room: int
) -> Float[Array, "N D"]:
    """Returns what the choices of one round add to the result."""
    devices, here, k = jax.lax.axis_size("expert"), len(weights["down"]), ids.shape[1]
    flat = ids.reshape(-1)
    at = _by_device(flat // here, devices, room, number)
    sent = jnp.where(at.item < flat.size, flat.at[at.item].get(mode="clip") % here, here)
    going = jnp.clip(at.sizes - number * room, 0, room)
    coming = _exchange(going)
    rows, scales = _send(spread(x, at, k), going, coming), _exchange(_spread_gates(gates, at))
    block = block_size(flat.size, here)
    inside = group(_exchange(sent), here, block)
    rows, scales = spread(rows, inside, 1), _spread_gates(scales, inside)
    rows = feed_forward(rows, scales, weights, inside.sizes, block)
    return _summed(collect(_send(collect(rows, inside), coming, going), at), k)


@jax.custom_vjp
def _send(
    rows: Float[Array, "P D"], going: Int[Array, "devices"], coming: Int[Array, "devices"]
) -> Float[Array, "P D"]:
    """Returns each device's part of the rows, from all devices in order. Of each part the first so
    many are `going` and `coming`; TPUs send no others."""
    if not on_tpu():
        return _exchange(rows)
    starts = jnp.arange(len(going)) * (room := len(rows) // len(going))
    here = jnp.full_like(going, jax.lax.axis_index("expert") * room)
    return jax.lax.ragged_all_to_all(
        rows, jnp.zeros_like(rows), starts, going, here, coming, axis_name="expert"
    )


_send.defvjp(
    lambda rows, going, coming: (_send(rows, going, coming), (going, coming)),
    lambda saved, grad: (_send(grad, *saved[::-1]), None, None),
)


def _exchange(a: Array) -> Array:
    """Returns each device's part of the first axis, from all devices in order."""
    return jax.lax.all_to_all(a, "expert", split_axis=0, concat_axis=0, tiled=True)


def _by_device(device: Int[Array, "M"], devices: int, room: int, number) -> Groups:
    """Returns the places of one round: `room` rows for each device."""
    counts, within = places(device, devices)
    within = within - number * room
    valid = (device < devices) & (within >= 0) & (within < room)
    row = jnp.where(valid, device * room + within, devices * room)
    empty = jnp.full(devices * room, len(device), jnp.int32)
    return Groups(empty.at[row].set(jnp.arange(len(device)), mode="drop"), row, counts)
