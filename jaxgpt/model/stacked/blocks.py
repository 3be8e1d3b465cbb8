"""Layers whose arrays are stacked, also where they are not all alike.

Layers differ in their window and in their feed-forward, a mixture or a dense one. Every array has
the layers that have it as its first axis: of a model of four layers, the second and the fourth of
them mixtures, `attention/query/kernel` has 4, `mlp/experts/up/kernel` and `mlp/up/kernel` 2 each.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from jaxgpt.config import Config, ModelConfig
from jaxgpt.config.experts import layers_with


class Kind(NamedTuple):
    """What may tell two layers of a stack apart."""

    window: int
    is_mixture: bool


class Part(NamedTuple):
    """Consecutive layers of one scan, each of whose turns runs `period` of them: one each of a
    pattern of kinds that repeats."""

    start: int
    stop: int
    period: int

    @property
    def turns(self) -> int:
        """How often the pattern repeats."""
        return (self.stop - self.start) // self.period


class Blocks(nnx.Module):
    """All layers of a stack, named as the parts of one: `attention`, `mlp`, ...; the axis of layers
    is split as `split` says."""

    def __init__(self, config: Config, rules, kernel: str, block: type, key: PRNGKeyArray, split):
        cfg = config.model
        kinds = layer_kinds(cfg)
        self.config, self.kinds, self.parts = cfg, kinds, parts_of(kinds, cfg.first_dense_layers)

        def make(key, kind: Kind):
            experts = cfg.num_experts if kind.is_mixture else 0
            own = dataclasses.replace(config, model=dataclasses.replace(cfg, num_experts=experts))
            return block(own, rules, kernel, kind.window, rngs=nnx.Rngs(params=key))

        def graph(kind: Kind):
            return nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0), kind)))

        self.graphdefs = tuple((kind, graph(kind)) for kind in dict.fromkeys(kinds))
        keys = jax.sharding.reshard(jax.random.split(key, len(kinds)), split)
        for name, part in nnx.from_flat_state(_stacked(make, kinds, keys)).items():
            setattr(self, name, _Tree(part))

    def turns(self, part: Part, params: nnx.State) -> dict:
        """Returns the arrays of a part's layers by path, with the turns as their first axis and the
        layers of a turn that have the array as their second; `params` are all layers'."""
        found = {}
        for path, array in nnx.to_flat_state(params):
            layers = self._layers_with(path)
            rows = [row for row, i in enumerate(layers) if part.start <= i < part.stop]
            if rows:
                own = array if len(rows) == len(layers) else _rows(array, rows[0], rows[-1] + 1)
                found[path] = jax.tree.map(lambda a: _by_turn(a, part.turns), own)
        return found

    def blocks_of(self, part: Part, turn: dict) -> Iterator[nnx.Module]:
        """Yields the blocks of one of the `turns` of a part."""
        for layer in range(part.start, part.start + part.period):
            arrays = {}
            for path, array in turn.items():
                layers = self._layers_with(path)
                if layer in layers:
                    place = sum(part.start <= i < layer for i in layers)
                    arrays[path] = jax.tree.map(lambda a, i=place: a[i], array)
            yield self.block(layer, nnx.from_flat_state(arrays))

    def block(self, layer: int, params) -> nnx.Module:
        """Returns one layer, of its own arrays."""
        return nnx.merge(dict(self.graphdefs)[self.kinds[layer]], params)

    def _layers_with(self, path: tuple) -> tuple[int, ...]:
        return layers_with("/".join(path), self.config)


class _Tree(nnx.Module):
    """Arrays by name, in parts by name."""

    def __init__(self, parts):
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nnx.Variable) else _Tree(part))


def layer_windows(cfg: ModelConfig) -> tuple[int, ...]:
    """Returns the windows of the repeating pattern of layers: (4, 4, 0) = two local, one full."""
    if not cfg.window or not cfg.full_attention_every:
        return (cfg.window,)
    return (cfg.window,) * (cfg.full_attention_every - 1) + (0,)


def layer_kinds(cfg: ModelConfig) -> tuple[Kind, ...]:
    """Returns the kind of each layer."""
    windows, mixtures = layer_windows(cfg), cfg.mixture_layers
    return tuple(Kind(windows[i % len(windows)], i in mixtures) for i in range(cfg.num_layers))


def parts_of(kinds: tuple[Kind, ...], first: int) -> tuple[Part, ...]:
    """Returns the parts of a stack: the first so many layers, and those after them, each with its
    shortest pattern."""
    parts = []
    for start, stop in ((0, first), (first, len(kinds))):
        own = kinds[start:stop]
        periods = (p for p in range(1, len(own) + 1) if own == own[:p] * (len(own) // p))
        parts += [Part(start, stop, period) for period in [*periods][:1]]
    return tuple(parts)


def added(losses: list[dict]) -> dict:
    """Returns the sums of auxiliary losses by name, over the layers that have them."""
    return {
        name: sum(own[name] for own in losses if name in own)
        for name in dict.fromkeys(name for own in losses for name in own)
    }


def _stacked(make, kinds: tuple[Kind, ...], keys) -> dict:
    """Returns the layers' parameters by path, each layer's drawn from its own key."""

    def draw(kind: Kind, keys) -> dict:
        return dict(nnx.to_flat_state(jax.vmap(lambda key: nnx.state(make(key, kind)))(keys)))

    layers: dict[bool, list[int]] = {}
    for i, kind in enumerate(kinds):
        layers.setdefault(kind.is_mixture, []).append(i)
    every = draw(kinds[0], keys)
    if len(layers) == 1:
        return every
    one, other = (draw(kinds[own[0]], keys[np.array(own)]) for own in layers.values())
    return one | other | {path: every[path] for path in one.keys() & other.keys()}


def _rows(array, start: int, stop: int):
    return jax.tree.map(lambda a: a[start:stop], array)


def _by_turn(a: jax.Array, turns: int) -> jax.Array:
    """Returns [turns, layers / turns, ...] of [layers, ...]."""
    spec, shape = jax.typeof(a).sharding.spec, (turns, a.shape[0] // turns, *a.shape[1:])
    first, *rest = spec.partitions
    return jax.lax.reshape(a, shape, out_sharding=jax.P(first, None, *rest, reduced=spec.reduced))
