"""Layers in stages over the mesh axis `pipeline`, by a circular schedule (see `config.pipeline`).

One program runs on all stages, inside a `shard_map` over `pipeline` alone; the other axes stay
explicit, so that a layer is what it is without a pipeline. (A `vmap` over stages, as praxis and
MaxText have it, would make of "this stage's weights of this round" a gather over all of them; here
it is a choice between two arrays.) At each tick a stage runs its layers of one round on one
microbatch and sends the result to the next stage (collective-permute).

The stack is stored as without a pipeline, in order: stage s holds a run of layers, not those that
it computes. At the start of a round each stage is sent its layers (all-to-all over `pipeline` of
the parts), cast and gathers them. As stages enter a round one tick after the other, the gathered
weights of two rounds are held. So each weight is gathered once in the forward and once in the
backward pass, however many microbatches there are.

Of the forward pass the inputs of all stages are kept. The backward pass is the same schedule with
items, stages and rounds in reverse: each stage computes its layers again and differentiates them.
The gradient of each item is scattered at once: whole sums of two rounds would need as much memory
as their weights, in float32 twice. Once a round's inputs are used up, its gradient is written into
their place (see `Kept`): kept beside them all, the gradients would be as large as the model.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxgpt.config import Config
from jaxgpt.config.pipeline import Schedule, schedule_of
from jaxgpt.model.pipeline.kept import (
    AXIS,
    Kept,
    at_index,
    is_copied,
    joined,
    own_size,
    parted,
    put,
)
from jaxgpt.parallel.collectives import all_gather, reduce_scatter
from jaxgpt.parallel.dropout import MicrobatchKey
from jaxgpt.parallel.microbatches import by_microbatch, by_stage, from_microbatches, from_stages
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parallel.specs import sharded_axis, sharding_axes, unsharded


class Stages(NamedTuple):
    """How the layers of a stack run in stages: `rules` are those inside a stage, `dtype` is that of
    the products."""

    schedule: Schedule
    rules: AxisRules
    dtype: jnp.dtype
    layers: int  # that a stage runs in one round


def stages_of(config: Config, rules: AxisRules) -> tuple[Stages | None, AxisRules]:
    """Returns how the layers run in stages, None where they do not (in decoding, which gathers
    them, they never do), and the rules that the layers are made with."""
    if "pipeline" not in rules.axes or not rules.split_batch:
        return None, rules
    axes = tuple(axis for axis in rules.axes if axis != "pipeline")
    inside = dataclasses.replace(rules, axes=axes, gathered=True)
    stages = jax.sharding.get_abstract_mesh().shape["pipeline"]
    at = schedule_of(config, stages)
    layers = config.model.num_layers // (at.stages * at.rounds)
    return Stages(at, inside, jnp.dtype(config.compute.dtype), layers), inside


def pipelined(
    layers: Callable, stages: Stages, stack, x: Float[Array, "B T D"], mask, keys
) -> tuple[Float[Array, "B T D"], dict]:
    """Returns the last layer's output and the layers' auxiliary losses, each summed over the layers
    and averaged over the microbatches.

    `layers(params, x, mask, keys, key_of)` runs consecutive layers on a microbatch, a layer with
    the key `key_of(key)`; kernels in `params` come as `rules.gathered` says. `stack`'s arrays have
    an axis of all layers in front, split over `pipeline`; `mask` is a tree of arrays of the batch,
    `keys` one of the layers.
    """
    count = stages.schedule.microbatches
    rows = jax.tree.map(lambda a: by_microbatch(_on_all_stages(by_stage(a)), count), mask)
    y, losses = _pipelined(_Run(layers, *stages[:3]), stack, by_stage(x), rows, keys)
    return from_stages(y), losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pipelined(run: "_Run", stack, x, mask, keys):
    return _forward(run, stack, x, mask, keys)[0]


def _forward(run, stack, x, mask, keys):
    y, saved, losses = _over_stages(
        run.forward, (P(AXIS), P(None, AXIS), P(), P()), (P(None, AXIS), P(AXIS), P())
    )(stack, x, mask, keys)
    return (y, losses), (stack, saved, mask, keys)


def _backward(run, kept, cotangents):
    grad_stack, grad_x = _over_stages(
        run.backward, (P(AXIS), P(AXIS), P(), P(), P(None, AXIS), P()), (P(AXIS), P(None, AXIS))
    )(*kept, *cotangents)
    sums = jax.tree.map(
        lambda g, p: jnp.sum(g, axis=1, dtype=jnp.float32).astype(p.dtype), grad_stack, kept[0]
    )
    return sums, grad_x, None, None


_pipelined.defvjp(_forward, _backward)


def _over_stages(f: Callable, in_specs: tuple, out_specs: tuple) -> Callable:
    """Returns `f`, whose first argument becomes the number of its stage, over all stages."""
    run = jax.shard_map(
        lambda number, *arguments: f(number[0], *arguments),
        in_specs=(P(AXIS), *in_specs),
        out_specs=out_specs,
        axis_names={AXIS},
        check_vma=False,
    )
    stages = jax.sharding.get_abstract_mesh().shape[AXIS]
    return functools.partial(run, jax.sharding.reshard(jnp.arange(stages), P(AXIS)))


def _on_all_stages(a: jax.Array) -> jax.Array:
    spec = jax.typeof(a).sharding.spec
    return jax.sharding.reshard(a, P(spec[0], None, *spec[2:]))


class _Run:
    """One schedule on one stage: everything here runs inside the `shard_map` over stages."""

    def __init__(self, layers: Callable, at: Schedule, rules: AxisRules, dtype: jnp.dtype):
        self.layers, self.at, self.rules, self.dtype = layers, at, rules, dtype

    def forward(self, s, stack, x, mask, keys):
        """Returns this stage's rows of the output, the inputs of its items, and the losses."""
        at = self.at
        items = by_microbatch(_manual(_all_rows, x), at.microbatches)
        kept = self._kept(stack, items)
        saved = kept.empty()
        run = functools.partial(self._run, mask=mask, keys=keys, s=s)
        params = jax.eval_shape(lambda: self._gather(stack, 0, s))
        losses = jax.eval_shape(lambda p: run(p, at_index(items, 0), 0)[1], params)
        losses = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), losses)

        def tick(state, t, params):
            arrived, items, saved, losses = state
            items = _store(items, arrived, t - at.stages, at.microbatches)
            item = jnp.clip(t - s, 0, at.items - 1)
            valid = item == t - s
            x = jnp.where(s == 0, at_index(items, item % at.microbatches), arrived)
            saved = kept.put_input(saved, x, item, valid)
            y, added = run(params, x, item)
            losses = jax.tree.map(lambda a, b: a + jnp.where(valid, b, 0), losses, added)
            return jax.lax.ppermute(y, AXIS, _ring(at.stages, 1)), items, saved, losses

        state = _zeros(at_index(items, 0)), items, saved, losses
        state = self._ticks(tick, state, s, lambda r: self._gather(stack, r, s))
        arrived, items, saved, losses = state
        items = _store(items, arrived, at.items - 1, at.microbatches)
        losses = jax.tree.map(lambda a: jax.lax.psum(a, AXIS) / at.microbatches, losses)
        return self._spread(items, s, 0), saved[None], losses

    def backward(self, s, stack, saved, mask, keys, grad_y, grad_losses):
        """Returns the gradients of this stage's part of the stack, [L / S, devices, ...], and of
        its rows of the input."""
        at, saved, last = self.at, saved[0], self.at.stages - 1
        items = by_microbatch(_manual(_all_rows, grad_y), at.microbatches)
        kept = self._kept(stack, items)
        run = functools.partial(self._run, mask=mask, keys=keys, s=s)
        grad_losses = jax.tree.map(lambda a: a / at.microbatches, grad_losses)

        def tick(state, t, params):
            arrived, items, saved, grads, total = state
            # What arrives at the last stage is the first one's of an item that came back
            items = _store(items, arrived, t - at.stages, at.microbatches, reverse=True)
            back = jnp.clip(t - (last - s), 0, at.items - 1)
            valid, item = back == t - (last - s), at.items - 1 - back
            grad = jnp.where(s == last, at_index(items, item % at.microbatches), arrived)
            x = kept.input(saved, item)
            grad = jnp.where(valid, grad, 0)
            losses = jax.tree.map(lambda a: jnp.where(valid, a, 0), grad_losses)
            _, pullback = jax.vjp(lambda params, x: run(params, x, item), params, x)
            grad_params, grad_x = pullback((grad, losses))
            (r, m), added = divmod(item, at.microbatches), self._scatter(grad_params, stack)
            first = m == at.microbatches - 1
            total = jax.tree.map(lambda a, b: jnp.where(first, 0, a) + b, total, added)
            of_kernels, of_others = parted(total)
            saved = kept.put_gradients(saved, of_kernels, r, m == 0)
            grads = [put(a, b, r) for a, b in zip(grads, of_others, strict=True)]
            sent = jax.lax.ppermute(grad_x, AXIS, _ring(at.stages, -1))
            return sent, items, saved, grads, total

        params = jax.eval_shape(lambda: self._gather(stack, 0, s))
        total = jax.tree.map(_zeros, jax.eval_shape(lambda p: self._scatter(p, stack), params))
        of_kernels, of_others = parted(total)
        grads = [_zeros(a, (at.rounds, *a.shape), in_front=(None,)) for a in of_others]
        state = _zeros(at_index(items, 0)), items, saved, grads, total
        arrived, items, saved, grads, _ = self._ticks(
            tick, state, last - s, lambda r: self._gather(stack, at.rounds - 1 - r, s)
        )
        items = _store(items, arrived, at.items - 1, at.microbatches, reverse=True)
        of_kernels = self._deal_back(lambda r: kept.gradients(saved, of_kernels, r), s)
        of_others = self._deal_back(lambda r: [at_index(a, r) for a in grads], s)
        return joined(total, of_kernels, of_others), self._spread(items, s, last)

    def _kept(self, stack, items) -> Kept:
        kernels, _ = parted(stack)
        return Kept(self.at, items, sum(map(own_size, kernels)) // self.at.rounds)

    def _ticks(self, tick: Callable, state, place, gather: Callable):
        """Returns the state after all ticks, `tick(state, t, params)` each; `place` says how many
        ticks after the first stage to work this one enters a round."""
        at = self.at

        def one_round(carry, r):
            before, state = carry
            now = gather(r)

            def one_tick(state, j):
                params = jax.tree.map(lambda a, b: jnp.where(j < place, a, b), before, now)
                return tick(state, r * at.microbatches + j, params), None

            state, _ = jax.lax.scan(one_tick, state, jnp.arange(at.microbatches))
            return (now, state), None

        none = jax.tree.map(_zeros, jax.eval_shape(lambda: gather(0)))
        (params, state), _ = jax.lax.scan(one_round, (none, state), jnp.arange(at.rounds))
        drain = at.items + jnp.arange(at.stages - 1)
        return jax.lax.scan(lambda state, t: (tick(state, t, params), None), state, drain)[0]

    def _run(self, params, x, item, *, mask, keys, s):
        """Returns the stage's output for one of its items, and its layers' losses in float32."""
        at = self.at
        m, part = item % at.microbatches, item // at.microbatches * at.stages + s
        each = jax.tree.leaves(params)[0].shape[0]
        part_keys = jax.tree.map(lambda k: jax.lax.dynamic_slice_in_dim(k, part * each, each), keys)
        key_of = functools.partial(MicrobatchKey, index=m, count=at.microbatches)
        rows = jax.tree.map(lambda a: at_index(a, m), mask)
        y, losses = self.layers(params, x, rows, part_keys, key_of)
        return y, jax.tree.map(lambda a: a.astype(jnp.float32), losses)

    def _gather(self, stack, r, s):
        """Returns this stage's layers of round r: kernels whole, a copy for each device."""

        def one(path, a):
            spec = jax.typeof(a).sharding.spec
            axes, axis = sharding_axes(spec), _split_axis(spec)

            def local(a, r, s):
                if not is_copied(path):
                    return self._deal(a, r, s, a.dtype)
                a = self._deal(a, r, s, self.dtype)
                a = all_gather(a, axis, self.rules.torus, axes) if axes else a
                return a[:, None]

            out = (
                P(None, self.rules.rows or None, *unsharded(P(*spec[1:])))
                if is_copied(path)
                else spec
            )
            run = jax.shard_map(local, in_specs=(spec, P(), P()), out_specs=out, check_vma=False)
            return run(a, r, s)

        return jax.tree_util.tree_map_with_path(one, stack)

    def _scatter(self, grads, stack):
        """Returns the gradients of one item's layers as parts, in float32, [K, devices, ...]: still
        to be summed over those devices that hold the same parts."""

        def one(path, g, a):
            if not is_copied(path):
                return g.astype(jnp.float32)[:, None]
            spec = jax.typeof(a).sharding.spec
            axes, axis = sharding_axes(spec), _split_axis(spec)
            others = tuple(name for name in self.rules.rows if name not in axes) or None

            def local(g):
                g = g[:, 0]
                g = reduce_scatter(g, axis, self.rules.torus, axes) if axes else g
                return g.astype(jnp.float32)[:, None]

            given = P(None, self.rules.rows or None, *unsharded(P(*spec[1:])))
            out = P(None, others, *spec[1:])
            return jax.shard_map(local, in_specs=given, out_specs=out, check_vma=False)(g)

        return jax.tree_util.tree_map_with_path(one, grads, stack)

    def _deal(self, a, r, s, dtype):
        """Returns this stage's layers of round r, from each stage's run of all layers."""
        at = self.at
        if at.rounds == 1:
            return a.astype(dtype)
        parts = a.reshape(at.rounds, a.shape[0] // at.rounds, *a.shape[1:])
        wanted = r * at.stages + jnp.arange(at.stages)  # by each stage
        here = jnp.clip(wanted - s * at.rounds, 0, at.rounds - 1)
        sent = jnp.stack([_cast(at_index(parts, here[i]), dtype) for i in range(at.stages)])
        received = jax.lax.all_to_all(sent, AXIS, split_axis=0, concat_axis=0, tiled=True)
        return at_index(received, (r * at.stages + s) // at.rounds)

    def _deal_back(self, of_round: Callable, s) -> list:
        """Returns the gradients of this stage's run of all layers, from those that `of_round(r)`
        gives of its layers in each round, [K, ...]."""
        at = self.at
        if at.rounds == 1:
            return of_round(0)

        def exchange(a):
            # Each stage sends to all; that whose run it is takes it
            sent = jnp.stack([a] * at.stages)
            return jax.lax.all_to_all(sent, AXIS, split_axis=0, concat_axis=0, tiled=True)

        def one(totals, r):
            own = r * at.stages + jnp.arange(at.stages) - s * at.rounds
            found = [_manual(exchange, a, in_front=1) for a in of_round(r)]
            for i in range(at.stages):
                place = jnp.clip(own[i], 0, at.rounds - 1)
                totals = [
                    put(total, jnp.where(place == own[i], a[i], at_index(total, place)), place)
                    for total, a in zip(totals, found, strict=True)
                ]
            return totals, None

        first = jax.eval_shape(lambda: of_round(0))
        totals = [_zeros(a, (at.rounds, *a.shape), in_front=(None,)) for a in first]
        totals, _ = jax.lax.scan(one, totals, jnp.arange(at.rounds))
        return [
            jax.lax.reshape(
                a,
                (a.shape[0] * a.shape[1], *a.shape[2:]),
                out_sharding=P(None, *jax.typeof(a).sharding.spec[2:]),
            )
            for a in totals
        ]

    def _spread(self, items, s, owner):
        """Returns each stage's rows of what stage `owner` has."""
        return _manual(_own_rows, from_microbatches(jnp.where(s == owner, items, 0)))


_all_rows = functools.partial(jax.lax.all_gather, axis_name=AXIS, axis=1, tiled=True)
_own_rows = functools.partial(jax.lax.psum_scatter, axis_name=AXIS, scatter_dimension=1, tiled=True)


def _manual(collective: Callable, a: jax.Array, in_front: int = 0) -> jax.Array:
    """Returns a collective over `pipeline`, of each device's own part along the other axes: with
    these explicit, XLA makes an array whole along them first. The result may have so many axes more
    in front."""
    spec = jax.typeof(a).sharding.spec
    out = P(*(None,) * in_front, *spec)
    return jax.shard_map(collective, in_specs=spec, out_specs=out, check_vma=False)(a)


def _split_axis(spec: P) -> int | None:
    return sharded_axis(spec) if sharding_axes(spec) else None


def _zeros(a, shape: tuple | None = None, dtype=None, in_front: tuple = ()) -> jax.Array:
    """Returns zeros like `a`, or of another shape and with further axes in front."""
    spec = jax.typeof(a).sharding.spec if isinstance(a, jax.Array) else a.sharding.spec
    return jnp.zeros(shape or a.shape, dtype or a.dtype, out_sharding=P(*in_front, *spec))


def _cast(a: jax.Array, dtype) -> jax.Array:
    """Returns a slice of a stack in another dtype. In between it is seen as bits: of floats, XLA
    casts the whole stack in front of the loop, through barriers too, and keeps it."""
    bits = jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")
    bits = jax.lax.optimization_barrier(bits)
    return jax.lax.bitcast_convert_type(bits, a.dtype).astype(dtype)


def _store(items, arrived, number, count: int, reverse: bool = False):
    """Returns `items` with what arrived as that of item `number` in its place, if there is such."""
    at = number % count
    at = count - 1 - at if reverse else at
    return put(items, jnp.where(number >= 0, arrived, at_index(items, at)), at)


def _ring(stages: int, step: int) -> list[tuple[int, int]]:
    return [(i, (i + step) % stages) for i in range(stages)]
