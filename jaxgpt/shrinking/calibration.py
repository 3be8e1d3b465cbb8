"""What goes into each projection on training text: its second moments, a layer at a time."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jaxgpt.metrics.progress import Bar
from jaxgpt.model import ModelSpec
from jaxgpt.model.layers import Linear
from jaxgpt.model.relative import bias_of
from jaxgpt.model.stacked.blocks import layer_windows
from jaxgpt.ops.mask import AttentionMask
from jaxgpt.parallel.fsdp import flat
from jaxgpt.shrinking.source import Source


def input_moments(source: Source, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the mean of x x^T over the tokens of `count` windows (rounded up to whole batches) for
    each layer, by projection: {"query": [I, I], ...}; and at last {"head": [D, D]}, of the hidden
    states that the head reads. Call it under `jax.set_mesh`.

    In memory are the activations of all windows at one depth, and the moments of one layer. Raises
    `BadInput` if the training text is shorter than a window.
    """
    rest, tokens = _without_blocks(source), 0
    for xs, sums in through_layers(source, count):
        tokens = sum(x.shape[0] * x.shape[1] for x in xs)
        if sums:
            yield {name: np.asarray(moment) / tokens for name, moment in sums.items()}
    yield {"head": sum(np.asarray(_head_moment(source.spec, rest, x)) for x in xs) / tokens}


def through_layers(source: Source, count: int) -> Iterator[tuple[list[jax.Array], dict]]:
    """Yields the hidden states of every batch of windows before the first layer, with {}, and then
    after each layer, with the sums of x x^T of its projections' inputs."""
    spec, batch = source.spec, source.config.batch_size
    sharding = NamedSharding(source.trained.mesh, spec.rules("batch", "seq"))
    windows = [
        {name: jax.device_put(a, sharding) for name, a in window.items() if name != "targets"}
        for window in source.windows(-(-count // batch) * batch, batch)
    ]
    rest = _without_blocks(source)
    xs = [_embed(spec, rest, window) for window in windows]
    yield list(xs), {}
    period, total = len(layer_windows(spec.model)), spec.model.num_layers * len(windows)
    with Bar("calibrate", total, "batches") as bar:
        for i in range(spec.model.num_layers):
            layer = jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), source.params["blocks"])
            sums = None
            for b, window in enumerate(windows):
                xs[b], found = _through_layer(spec, i % period, rest, layer, xs[b], window)
                sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
                bar.advance()
            yield list(xs), sums


def _without_blocks(source: Source) -> dict:
    return jax.tree.map(jnp.asarray, source.params | {"blocks": ()})


@partial(jax.jit, static_argnums=0)
def _embed(spec: ModelSpec, rest: dict, window: dict) -> Float[Array, "B T D"]:
    model = spec.bind(rest)
    return model.stack.embed(model.vocabulary.embed(window["inputs"]), _positions(window))


@partial(jax.jit, static_argnums=0)
def _head_moment(spec: ModelSpec, rest: dict, x: Float[Array, "B T D"]) -> Float[Array, "D D"]:
    return _moment(spec.bind(rest).stack.final_norm(x))


@partial(jax.jit, static_argnums=(0, 1))
def _through_layer(spec: ModelSpec, kind: int, rest: dict, layer: dict, x, window: dict):
    """Returns a layer's output and the sums of x x^T of its projections' inputs; `kind` is the
    layer's place in the pattern of windows."""
    model = spec.bind(rest)
    block, sums = model.stack.blocks.block(kind, nnx.State(layer)), {}
    for path, part in nnx.iter_graph(block):
        if isinstance(part, Linear):
            part.storage = _Recording(part.storage, path[-1], sums)
    positions, segments = _positions(window), window.get("segments")
    mask = AttentionMask(positions, positions, segments, segments)
    mask = jax.sharding.reshard(mask, spec.rules("batch", "seq"))
    bias = bias_of(model.stack.relative, mask, "positions" not in window)
    x, _ = block(x, mask, bias=bias)
    return jax.sharding.reshard(x, spec.rules("batch", "residual", None)), sums


class _Recording:
    """A projection's storage that also adds up what it multiplies, into `sums` under `name`."""

    def __init__(self, storage, name: str, sums: dict):
        self.storage, self.name, self.sums = storage, name, sums

    def product(self, equation: str, x, kernel, out, rules):
        self.sums[self.name] = _moment(flat(x, 2, x.ndim))
        return self.storage.product(equation, x, kernel, out, rules)


def _moment(x: Float[Array, "B T I"]) -> Float[Array, "I I"]:
    x = x.astype(jnp.float32)
    return jnp.einsum("BTI,BTJ->IJ", x, x, out_sharding=jax.P(None, None))


def _positions(window: dict):
    inputs = window["inputs"]
    counted = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    return window.get("positions", counted)
