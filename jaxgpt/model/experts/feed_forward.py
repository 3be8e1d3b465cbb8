"""Rows through the experts they belong to, whose matrices are gathered just before they multiply.

What a device holds of each matrix is gathered in the forward pass and again in the backward pass,
and each gradient is scattered as soon as it is made. Where a layer's gathered matrices, or what
they make of the rows, are large, the experts' width is computed in parts: an expert's output is the
sum over them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from jaxgpt.model.experts.grouped import on_tpu, outer_products, products
from jaxgpt.parallel.collectives import all_gather, reduce_scatter
from jaxgpt.parallel.torus import Torus

MOST_BYTES = 2**28  # of one gathered matrix, and of what it makes of the rows
LANES = 128  # a TPU's: parts are multiples of them

Weights = dict[str, Float[Array, "E _ _"]]  # gate (of gated ones), up [E, D, F] and down [E, F, D]


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """Returns `scale * down(act(gate(row), up(row)))` of each row by the expert of its group, from
    what this device holds of the matrices.

    The scale is multiplied before `down`: so the backward pass needs no expert's output again.
    """

    act: Callable  # of gate's and up's outputs, or of up's alone
    keep: bool  # the outputs of gate and up for the backward pass; otherwise it makes them again
    over: tuple[str, ...]  # the mesh axes that split the matrices' D
    torus: Torus

    def __call__(
        self,
        rows: Float[Array, "P D"],
        scales: Float[Array, "P"],
        weights: Weights,
        sizes: Int[Array, "E"],
        block: int,
    ) -> Float[Array, "P D"]:
        run = functools.partial(_through, self, block)
        with jax.named_scope("experts"):
            if self.devices() > 1:  # half the bytes to gather
                weights = {name: _cast(w, rows.dtype) for name, w in weights.items()}
            turned = weights | {"down": weights["down"].swapaxes(1, 2)}
            if (parts := self.parts(turned["up"], len(rows))) == 1:
                return run(rows, scales, turned, sizes)

            def add(y, part):
                return y + run(rows, scales, part, sizes), None

            cut = jax.tree.map(lambda w: _cut(w, parts), turned)
            return jax.lax.scan(add, jnp.zeros_like(rows), cut)[0]

    def devices(self) -> int:
        """Returns over how many devices the matrices' D is split."""
        return math.prod(map(jax.lax.axis_size, self.over))

    def of_columns(
        self,
        columns: Float[Array, "P d"],
        scales: Float[Array, "P"],
        weights: Weights,
        sizes: Int[Array, "E"],
        block: int,
    ) -> Float[Array, "P d"]:
        """Returns this device's columns of the same, from its columns of rows that all devices
        have. Of few rows those are sent instead of the matrices; it has no efficient gradient."""
        made = (products(columns, weights[name], sizes, block) for name in _inputs(weights))
        made = (jax.lax.psum(a.astype(jnp.float32), self.over).astype(a.dtype) for a in made)
        return products(_scaled(self.act(*made), scales), weights["down"], sizes, block)

    def parts(self, w: Float[Array, "E d F"], rows: int) -> int:
        """Returns in how many parts the experts' width is computed."""
        devices, width = self.devices(), w.shape[2]
        size = max(w.size * devices, rows * width) * w.dtype.itemsize
        fit = (n for n in range(1, width) if width % (n * LANES) == 0 and size <= n * MOST_BYTES)
        return next(fit, 1) if devices > 1 else 1

    def whole(self, w: Float[Array, "E d F"]) -> Float[Array, "E D F"]:
        """Returns the matrices that the devices hold parts of."""
        if self.devices() == 1:
            return w
        return all_gather(w, 1, self.torus, self.over)

    def own(self, grad: Float[Array, "E D F"]) -> Float[Array, "E d F"]:
        """Returns this device's part of the gradient, summed over the devices.

        It is sent as a matrix with D in front: from between two axes, XLA's TPU compiler sums it
        whole on every device.
        """
        if self.devices() == 1:
            return grad
        experts, _, width = grad.shape
        matrix = grad.swapaxes(0, 1).reshape(-1, experts * width)
        own = reduce_scatter(matrix, 0, self.torus, self.over)
        return own.reshape(-1, experts, width).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cast(w: Float[Array, "E _ _"], dtype) -> Float[Array, "E _ _"]:
    """Returns w in another dtype; it and its gradient stay in the layout of parameters. XLA's TPU
    compiler would turn the stacks of all layers into what a product likes, and keep the copies."""
    return _as_stored(w).astype(dtype)


_cast.defvjp(
    lambda w, dtype: (_cast(w, dtype), jnp.zeros(0, w.dtype)),
    lambda _, like, grad: (_as_stored(grad.astype(like.dtype)),),
)


def _as_stored(w: Float[Array, "E _ _"]) -> Float[Array, "E _ _"]:
    """Returns w in the layout that a TPU's parameters have."""
    whole_lanes = w.shape[2] % LANES == 0  # otherwise the axis before may come last
    return with_layout_constraint(w, Layout((0, 1, 2))) if on_tpu() and whole_lanes else w


def _cut(w: Float[Array, "E d F"], parts: int) -> Float[Array, "n E d f"]:
    return jnp.moveaxis(w.reshape(*w.shape[:2], parts, -1), 2, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _through(how: FeedForward, block: int, rows, scales, weights, sizes):
    """Of one part of the width; `weights` are [E, d, f], down's transposed."""
    return _forward(how, block, rows, scales, weights, sizes)[0]


def _inputs(weights: Weights) -> list[str]:
    return [name for name in ("gate", "up") if name in weights]


def _forward(how, block, rows, scales, weights, sizes):
    made = tuple(
        products(rows, how.whole(weights[name]), sizes, block) for name in _inputs(weights)
    )
    hidden = _scaled(how.act(*made), scales)
    down = how.whole(weights["down"])
    y = products(hidden, down, sizes, block, turned=True)
    return y, (rows, scales, weights, sizes, made if how.keep else None)


def _scaled(hidden: Float[Array, "P F"], scales: Float[Array, "P"]) -> Float[Array, "P F"]:
    return (hidden * scales[:, None]).astype(hidden.dtype)


def _backward(how, block, saved, grad):
    rows, scales, weights, sizes, made = saved
    whole = {name: how.whole(w) for name, w in weights.items()}
    if made is None:
        made = tuple(products(rows, whole[name], sizes, block) for name in _inputs(weights))
    grad_hidden = products(grad, whole["down"], sizes, block)
    hidden, act_backward = jax.vjp(how.act, *made)
    grads = {"down": how.own(outer_products(grad, _scaled(hidden, scales), sizes, block))}
    grad_rows = jnp.zeros(rows.shape, jnp.float32)
    for name, grad_made in zip(_inputs(weights), act_backward(_scaled(grad_hidden, scales))):
        grads[name] = how.own(outer_products(rows, grad_made, sizes, block))
        grad_rows += products(grad_made, whole[name], sizes, block, turned=True)
    grad_scales = jnp.sum(hidden * grad_hidden, axis=1, dtype=jnp.float32)
    grads = {name: grads[name].astype(w.dtype) for name, w in weights.items()}
    return grad_rows.astype(rows.dtype), grad_scales, grads, None


_through.defvjp(_forward, _backward)
