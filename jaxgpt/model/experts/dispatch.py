"""Tokens to their experts and back, on one device or on the devices of the mesh axis `expert`.

Everything here runs inside `shard_map`, on one device's tokens.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config.schema import MESH_AXES
from jaxgpt.model.experts.grouped import Groups, block_size, collect, group, grouped_product, spread

BUFFER_MULTIPLE = 8  # rows of a TPU's tile


def mix(
    x: Float[Array, "N D"],
    ids: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    weights: dict[str, Float[Array, "E I O"]],
    act: Callable,
) -> Float[Array, "N D"]:
    """Returns the sum over each token's experts of gate times expert, of the experts that are here;
    ids from their number on have none."""
    experts, k = len(weights["down"]), ids.shape[1]
    block = block_size(ids.size, experts)
    at = group(ids.reshape(-1), experts, block)
    rows = _through(spread(x, at, k), at.sizes, weights, act, block)
    return _weighted(collect(rows, at), gates)


def _through(rows, sizes, weights: dict, act: Callable, block: int) -> Float[Array, "P D"]:
    """Returns `down(act(...))` of each row by its own expert."""

    def product(x, name: str):
        return grouped_product(x, weights[name], sizes, block)

    with jax.named_scope("experts"):
        hidden = act(*(product(rows, name) for name in ("gate", "up") if name in weights))
        return product(hidden, "down")


def _weighted(choices: Float[Array, "M D"], gates: Float[Array, "N k"]) -> Float[Array, "N D"]:
    choices = choices.reshape(*gates.shape, -1)
    summed = jnp.einsum("NkD,Nk->ND", choices, gates, preferred_element_type=jnp.float32)
    return summed.astype(choices.dtype)


def mix_own(x, ids, gates, weights, act) -> Float[Array, "N D"]:
    """Returns `mix` over all experts of tokens that every device of `expert` has."""
    own = ids - jax.lax.axis_index("expert") * (here := len(weights["down"]))
    own = jnp.where((own >= 0) & (own < here), own, here)
    return jax.lax.psum(mix(x, own, gates, weights, act), "expert")


def mix_over_devices(
    x: Float[Array, "N D"],
    ids: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    weights: dict[str, Float[Array, "E I O"]],
    act: Callable,
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
        return _send_and_return(number, ids, x, gates, weights, act, room)

    @jax.custom_vjp
    def rounds(ids, x, gates, weights):
        first = one_round(0, ids, x, gates, weights)
        return _further(lambda n: one_round(n, ids, x, gates, weights), first, _rounds(ids))

    def _rounds(ids):
        here = len(weights["down"])
        destinations = (ids // here).reshape(-1)[:, None] == jnp.arange(devices)
        needed = -(-jnp.max(jnp.sum(destinations, axis=0)) // room)
        return jax.lax.pmax(needed, tuple(MESH_AXES))  # all devices take part in all rounds

    def backward(saved, grad):
        ids, *given = saved

        def of_round(number):
            return jax.vjp(lambda *given: one_round(number, ids, *given), *given)[1](grad)

        return None, *_further(of_round, of_round(0), _rounds(ids))

    rounds.defvjp(lambda *given: (rounds(*given), given), backward)
    return rounds(ids, x, gates, weights)


def _further(of_round: Callable, first, rounds: Int[Array, ""]):
    """Returns the sum of `first` and `of_round(n)` for n from 1 on."""

    def add(carry):
        number, total = carry
        return number + 1, jax.tree.map(jnp.add, total, of_round(number))

    return jax.lax.while_loop(lambda carry: carry[0] < rounds, add, (jnp.int32(1), first))[1]


def _send_and_return(number, ids, x, gates, weights, act, room: int) -> Float[Array, "N D"]:
    """Returns what the choices of one round add to the result."""
    devices, here, k = jax.lax.axis_size("expert"), len(weights["down"]), ids.shape[1]
    flat = ids.reshape(-1)
    at = _by_device(flat // here, devices, room, number)
    sent = jnp.where(at.item < flat.size, flat.at[at.item].get(mode="clip") % here, here)
    rows, owner = _exchange(spread(x, at, k)), _exchange(sent)
    block = block_size(flat.size, here)
    inside = group(owner, here, block)
    rows = _through(spread(rows, inside, 1), inside.sizes, weights, act, block)
    return _weighted(collect(_exchange(collect(rows, inside)), at), gates)


def _exchange(a: Array) -> Array:
    """Returns each device's part of the first axis, from all devices in order."""
    return jax.lax.all_to_all(a, "expert", split_axis=0, concat_axis=0, tiled=True)


def _by_device(device: Int[Array, "M"], devices: int, room: int, number) -> Groups:
    """Returns the places of one round: `room` rows for each device."""
    counts = jnp.sum(device[:, None] == jnp.arange(devices), axis=0, dtype=jnp.int32)
    rank = jnp.argsort(jnp.argsort(device, stable=True)).astype(jnp.int32)
    within = rank - jnp.append(jnp.cumsum(counts) - counts, 0)[device] - number * room
    valid = (device < devices) & (within >= 0) & (within < room)
    row = jnp.where(valid, device * room + within, devices * room)
    empty = jnp.full(devices * room, len(device), jnp.int32)
    return Groups(empty.at[row].set(jnp.arange(len(device)), mode="drop"), row, counts)
