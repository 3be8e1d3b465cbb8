"""Heads, feed-forward columns and layers: how important each is, and the model without some."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.config import ModelConfig
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import token_losses
from jaxgpt.shrinking.calibration import through_layers
from jaxgpt.shrinking.source import Source
from jaxgpt.system.errors import BadInput

Window = dict[str, Int[np.ndarray, "1 T"]]  # inputs and targets (packed: segments, positions)

# Axis of the units in the stacked arrays [L, ...], by path below `blocks`
HEADS = {"attention/query/kernel": 2, "attention/query/bias": 1, "attention/out/kernel": 1}
KV_HEADS = {
    f"attention/{name}/{part}": axis
    for name in ("key", "value")
    for part, axis in (("kernel", 2), ("bias", 1))
}
COLUMNS = {
    f"mlp/{name}/{part}": axis
    for name in ("gate", "up")
    for part, axis in (("kernel", 2), ("bias", 1))
} | {"mlp/down/kernel": 1}


def gate_importance(
    spec: ModelSpec, params: dict, windows: Sequence[Window]
) -> tuple[Float[np.ndarray, "L K"], Float[np.ndarray, "L F"]]:
    """Returns the importance of each group of heads that share a key head, and of each feed-forward
    column: how far the loss moves, to first order, if its output is scaled by a gate.

    That is the mean over windows of |d loss / d gate| (arXiv:1905.10650, eq. 5). A gate before a
    matrix W has the gradient sum(W * dW) over the rows of W that it feeds (arXiv:1906.10271). Each
    window is one row, with its `targets`.
    """
    spec, cfg = spec.for_decoding(), spec.model
    heads = np.zeros((cfg.num_layers, cfg.num_kv_heads))
    columns = np.zeros((cfg.num_layers, cfg.mlp_dim))

    def loss(blocks, rest, micro):
        nats, _ = token_losses(spec.bind(rest | {"blocks": blocks}), micro, None)
        return jnp.sum(nats)

    @jax.jit
    def gates(params, micro):
        rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
        blocks = params["blocks"]
        grads = jax.grad(loss)(blocks, rest, micro)
        out = blocks["attention"]["out"]["kernel"] * grads["attention"]["out"]["kernel"]
        down = blocks["mlp"]["down"]["kernel"] * grads["mlp"]["down"]["kernel"]
        return jnp.sum(out, axis=(2, 3)), jnp.sum(down, axis=2)

    for window in windows:
        micro = jax.tree.map(jnp.asarray, window)
        of_heads, of_columns = (np.asarray(g, np.float64) for g in gates(params, micro))
        of_groups = of_heads.reshape(*heads.shape, -1).sum(axis=2)
        heads += np.abs(of_groups) / len(windows)
        columns += np.abs(of_columns) / len(windows)
    return heads, columns


def most_important(importance: Float[np.ndarray, "L U"], share: float) -> Int[np.ndarray, "L R"]:
    """Returns the units that stay in each layer, in order, without the least important share."""
    units = importance.shape[1]
    order = np.argsort(-importance, axis=1, kind="stable")
    return np.sort(order[:, : units - round(share * units)], axis=1)


def without_heads_and_columns(
    params: dict, cfg: ModelConfig, groups: Int[np.ndarray, "L R"], columns: Int[np.ndarray, "L C"]
) -> tuple[dict, ModelConfig]:
    """Returns the parameters with only these groups of heads and feed-forward columns of each
    layer, in smaller arrays, and their model."""
    per_group = cfg.num_heads // cfg.num_kv_heads
    heads = (groups[:, :, None] * per_group + np.arange(per_group)).reshape(len(groups), -1)
    kept = (
        {path: (axis, heads) for path, axis in HEADS.items()}
        | {path: (axis, groups) for path, axis in KV_HEADS.items()}
        | {path: (axis, columns) for path, axis in COLUMNS.items()}
    )

    def take(path: str, array: np.ndarray) -> np.ndarray:
        if path not in kept:
            return array
        axis, index = kept[path]
        shape = [1] * array.ndim
        shape[0], shape[axis] = index.shape
        return np.take_along_axis(np.asarray(array), index.reshape(shape), axis)

    sizes = dict(num_heads=heads.shape[1], num_kv_heads=groups.shape[1], mlp_dim=columns.shape[1])
    return params | {"blocks": _by_path(take, params["blocks"])}, dataclasses.replace(cfg, **sizes)


def all_heads(cfg: ModelConfig) -> ModelConfig:
    """Returns the model with so many heads that they are together as wide as the embedding, where
    some were removed."""
    count, rest = divmod(cfg.embed_dim, cfg.head_dim)
    if rest or count < cfg.num_heads or cfg.num_heads != cfg.num_kv_heads:
        return cfg
    return dataclasses.replace(cfg, num_heads=count, num_kv_heads=count)


def with_silent_heads(params: dict, count: int) -> dict:
    """Returns the parameters with heads of zeros, which add nothing, behind each layer's own: as
    many that there are `count`."""
    axes = HEADS | KV_HEADS

    def filled(path: str, array: np.ndarray) -> np.ndarray:
        if path not in axes:
            return array
        wider = [(0, 0)] * array.ndim
        wider[axes[path]] = 0, count - array.shape[axes[path]]
        return np.pad(array, wider)

    return params | {"blocks": _by_path(filled, params["blocks"])}


def block_influence(source: Source, count: int) -> Float[np.ndarray, "L"]:
    """Returns how much each layer turns its input: 1 - the mean over the positions of `count`
    windows of the cosine between its input and its output (arXiv:2403.03853, eq. 1). Call under
    `jax.set_mesh`."""
    before, influence = [], []
    for after, _ in through_layers(source, count):
        cosines = [float(_cosine(x, y)) for x, y in zip(before, after, strict=False)]
        influence += [1 - np.mean(cosines)] if cosines else []
        before = after
    return np.array(influence)


@jax.jit
def _cosine(x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, ""]:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.mean(jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-30))


def check_heads_alone(cfg: ModelConfig) -> None:
    """Raises `BadInput` where layers share what each of their heads is given."""
    if cfg.position == "relative":
        raise BadInput(
            "heads cannot be removed with model.position=relative: all layers have one table with"
            " a column for each head, and each layer loses others"
        )


def check_layers_alike(cfg: ModelConfig) -> None:
    """Raises `BadInput` where layers differ by a pattern, which removing some would shift."""
    if cfg.window and cfg.full_attention_every:
        raise BadInput(
            f"layers cannot be removed: every {cfg.full_attention_every}th of them attends to all"
            " (model.full_attention_every), and others would take its place"
        )


def without_layers(
    params: dict, cfg: ModelConfig, kept: Int[np.ndarray, "R"]
) -> tuple[dict, ModelConfig]:
    """Returns the parameters with these layers only, and their model."""
    blocks = jax.tree.map(lambda a: np.asarray(a)[kept], params["blocks"])
    return params | {"blocks": blocks}, dataclasses.replace(cfg, num_layers=len(kept))


def _by_path(change, tree: dict, prefix: str = "") -> dict:
    """Returns `change(path, leaf)` for every leaf."""
    return {
        name: _by_path(change, child, f"{prefix}{name}/")
        if isinstance(child, dict)
        else change(prefix + name, child)
        for name, child in tree.items()
    }
