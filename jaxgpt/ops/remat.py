"""What a layer keeps for the backward pass, by `compute.remat`; the rest is computed again."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jaxgpt.ops.kernels import SAVED
from jaxgpt.parallel.fsdp import GATHERED
from jaxgpt.parallel.specs import num_shards

RESIDUAL_STREAM = "residual_stream"  # what each layer is given
_policies = jax.checkpoint_policies


def all_but_gathered_weights(primitive, *_, **params) -> bool:
    """Says whether to keep a result: all but those named `GATHERED`, and the all-gathers before the
    name. (JAX's `save_anything_except_these_names` keeps everything.)"""
    return primitive.name != "all_gather" and params.get("name") != GATHERED


REMAT = {
    "none": all_but_gathered_weights,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(SAVED)
    ),
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL_STREAM],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def scan_layers(
    apply: Callable, x: Float[Array, "B T D"], turns, rest, *, remat: str, unroll: int
) -> tuple:
    """Returns `jax.lax.scan` of `apply(x, turn, rest) -> (x, y)` over the leading axis of `turns`,
    which keeps for the backward pass what `remat` says.

    Whatever has a gradient is an argument of `apply`. `rest` holds integers, positions first.
    """
    if remat == "full":
        return _scan_full(apply, x, turns, rest, unroll)
    if remat in ("none", "dots") and unroll > 1 and _on_one_cpu():
        apply = _layer_by_layer(apply, len(x) * x.shape[1])
    elif remat != "none" or num_shards() > 1:
        apply = jax.checkpoint(apply, policy=REMAT[remat], prevent_cse=unroll > 1)
    return jax.lax.scan(lambda x, turn: apply(x, turn, rest), x, turns, unroll=unroll)


def _on_one_cpu() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size == 1 and mesh.abstract_device.platform == "cpu"


def _layer_by_layer(apply: Callable, num_tokens: int) -> Callable:
    """Returns `apply` for layers that follow one another in one program, not in a loop.

    Kept are the results of matrix products and of attention; norms and activations, whose reading
    back would take as long, are computed again. `jax.checkpoint` alone would not save memory: XLA
    is free to compute all of it at the start of the backward pass, and to leave the gradients of
    all parameters for its end. So what is computed again gets the incoming gradient as an input,
    and the outgoing one those of the layer's parameters: zeros made of them are added.
    """
    kept = jax.checkpoint(apply, policy=REMAT["dots"], prevent_cse=False)

    @jax.custom_vjp
    def run(x, turn, rest):
        return apply(x, turn, rest)

    def forward(*given):
        trained = jax.tree.map(lambda a: a.value if a.perturbed else None, given)
        others = jax.tree.map(lambda a: None if a.perturbed else a.value, given)
        return jax.vjp(lambda trained: kept(*_joined(trained, others)), trained)

    def backward(pullback, grads):
        grads = jax.tree.map(_as_array, grads)
        start = _zero_of(grads[0])

        def is_of_tokens(a) -> bool:  # a parameter that looks so costs a copy of it, no more
            return jnp.issubdtype(a.dtype, jnp.floating) and a.size % num_tokens == 0

        pullback = jax.tree.map(
            lambda a: a + start.astype(a.dtype) if is_of_tokens(a) else a, pullback
        )
        ((grad_x, grad_turn, grad_rest),) = pullback(grads)
        if grad_x is not None:  # of the first layer, whose embeddings may be frozen
            end = sum(map(_zero_of, jax.tree.leaves(grad_turn)), jnp.float32(0))
            grad_x += end.astype(grad_x.dtype)
        return grad_x, grad_turn, grad_rest

    run.defvjp(forward, backward, symbolic_zeros=True)  # frozen parameters have no gradient
    return run


def _as_array(grad):
    return np.zeros(grad.shape, grad.dtype) if isinstance(grad, SymbolicZero) else grad


def _zero_of(a: jax.Array) -> Float[Array, ""]:
    """Returns 0 in a way that no compiler can see; NaN of NaN."""
    first = jax.lax.slice(a, [0] * a.ndim, [1] * a.ndim).reshape(())
    return jnp.minimum(jnp.abs(first.astype(jnp.float32)), 0)


def _scan_full(apply: Callable, x: Float[Array, "B T D"], turns, rest, unroll: int) -> tuple:
    """Returns `scan_layers` with nothing kept but each turn's input, by a backward pass of its own.

    `jax.checkpoint` in `jax.lax.scan` gives the same numbers in more memory. JAX stacks the
    gradients of float32 parameters in float32, although those of matrix products are made in the
    compute dtype; here the stack is in that, until the optimizer reads it. And XLA's TPU compiler
    casts the whole stack of parameters to the compute dtype in front of the loop, a copy of the
    model that lasts until the backward pass is over; here it cannot. Of Llama 3 70B on 64 chips
    they are 2 GiB each.
    """
    floats, others = _parted(turns)
    shared, integers = _parted(rest)

    def call(x, floats, others, shared, integers):
        return apply(x, _joined(floats, others), _joined(shared, integers))

    @jax.custom_vjp
    def run(x, floats, shared, others, integers):
        def body(x, turn):
            return call(x, *turn, shared, integers)

        return jax.lax.scan(body, x, (floats, others), unroll=unroll)

    def forward(x, floats, shared, others, integers):
        def body(x, turn):
            one, floats, others = turn
            x_out, y = call(x, _times(one, floats), others, shared, integers)
            return x_out, (x, y)

        given = _ones(floats, integers), floats, others
        x, (inputs, y) = jax.lax.scan(body, x, given, unroll=unroll)
        return (x, y), (inputs, floats, shared, others, integers)

    def backward(saved, grads):
        inputs, floats, shared, others, integers = saved
        grad_x, grad_y = grads

        def body(carry, turn):
            grad_x, grad_shared = carry
            one, x, floats, others, grad_y = turn
            # Unrolled, the forward pass's values would be kept instead
            x, floats, grad_x = jax.lax.optimization_barrier((x, _times(one, floats), grad_x))

            def again(x, floats, shared):
                return call(x, floats, others, shared, integers)

            pullback = jax.vjp(again, x, floats, shared)[1]
            grad_x, grad_floats, added = pullback((grad_x, grad_y))
            grad_shared = jax.tree.map(jnp.add, grad_shared, added)
            # or a cast back to float32 would move into the loop
            narrowed = jax.lax.optimization_barrier(_narrowed(grad_floats, x.dtype))
            return (grad_x, grad_shared), narrowed

        start = grad_x, jax.tree.map(jnp.zeros_like, shared)
        given = _ones(floats, integers), inputs, floats, others, grad_y
        (grad_x, grad_shared), stacked = jax.lax.scan(
            body, start, given, reverse=True, unroll=unroll
        )
        grad_floats = jax.tree.map(lambda g, p: g.astype(p.dtype), stacked, floats)
        return grad_x, grad_floats, grad_shared, None, None

    run.defvjp(forward, backward)
    return run(x, floats, shared, others, integers)


def _narrowed(grads, dtype):
    """Returns the gradients of kernels in the compute dtype, in which they were made; a router's is
    float32 throughout."""

    def one(path, grad):
        name = jax.tree_util.keystr(path)
        return grad.astype(dtype) if "kernel" in name and "router" not in name else grad

    return jax.tree_util.tree_map_with_path(one, grads)


def _ones(stacks, integers) -> Float[Array, "L"]:
    """Returns a 1 for each turn, in a way that no compiler can see: it depends on a position."""
    count = jnp.arange(len(jax.tree.leaves(stacks)[0]))
    least = jnp.minimum(jnp.min(jax.tree.leaves(integers)[0]), 0)
    return (count >= least).astype(jnp.float32)


def _times(one: Float[Array, ""], floats):
    """Returns the same floats; a cast of them can no longer leave the loop."""
    return jax.tree.map(lambda a: a * one.astype(a.dtype), floats)


def _parted(tree) -> tuple:
    """Returns the leaves that have a gradient, and the others, None in each other's place."""

    def is_float(a) -> bool:
        return jnp.issubdtype(a.dtype, jnp.inexact)

    floats = jax.tree.map(lambda a: a if is_float(a) else None, tree)
    return floats, jax.tree.map(lambda a: None if is_float(a) else a, tree)


def _joined(floats, others):
    return jax.tree.map(
        lambda a, b: b if a is None else a, floats, others, is_leaf=lambda a: a is None
    )
