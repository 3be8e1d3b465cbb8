"""A mixture that starts as a dense model (sparse upcycling, arXiv:2212.05055): every expert is a
copy of its layer's feed-forward, and a token's weights add up to 1, so that the mixture computes
what the dense model does until the experts drift apart. The router is drawn anew."""

from collections.abc import Mapping

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.config.experts import layers_with
from jaxgpt.system.errors import BadInput

MLP, EXPERTS = "blocks/mlp/", "blocks/mlp/experts/"
ROUTER = "blocks/mlp/router/"
# What a dense model may leave open
FIELDS = ("num_experts", "expert_every", "first_dense_layers", "experts_per_token", "expert_dim")
FIELDS += ("shared_experts", "router", "normalize_gates", "gate_scale", "expert_capacity")


def is_upcycled(theirs: ModelConfig, mine: ModelConfig) -> bool:
    """Says whether a mixture starts from a dense model."""
    return mine.num_experts > 0 and not theirs.num_experts


def check_upcycling(path: str, theirs: ModelConfig, mine: ModelConfig) -> None:
    """Raises `BadInput` if the mixture would not start as the dense model at `path`."""
    start = f"init_from={path} is dense and cannot start this mixture: "
    if theirs.bias:
        raise BadInput(
            f"{start}its feed-forward has biases (model.bias=true), experts have none;"
            " train the dense model with --config.model.bias=false"
        )
    needed = dict(expert_dim=theirs.mlp_dim, shared_experts=0, normalize_gates=True)
    needed |= dict(gate_scale=1.0, expert_capacity=0.0)
    for name, value in needed.items():
        if (given := getattr(mine, name)) != value:
            raise BadInput(
                f"{start}model.{name}={given!r} must be {value!r}, so that experts which are copies"
                " of its feed-forward compute what it does"
            )


def upcycled(source: dict, mine: ModelConfig, wanted: Mapping) -> dict:
    """Returns the arrays of a dense model by path as those of the mixture, but for its routers, in
    the shapes and dtypes of `wanted`. Experts are views of one matrix."""
    found = {}
    for path, a in source.items():
        if not path.startswith(MLP):
            found[path] = a
            continue
        if mine.has_dense_layers:
            found[path] = a[list(layers_with(path.removeprefix("blocks/"), mine))]
        experts = wanted[name := path.replace(MLP, EXPERTS)]
        rows = np.asarray(a[list(mine.mixture_layers)]).astype(experts.dtype)
        found[name] = np.broadcast_to(rows[:, None], (*experts.shape[:2], *rows.shape[1:]))
    return found


def describe(path: str, mine: ModelConfig) -> str:
    """Returns the line of the log about it."""
    return (
        f"upcycle   {len(mine.mixture_layers)} of {mine.num_layers} layers: each of"
        f" {mine.num_experts} experts starts as a copy of the feed-forward in {path}, routers are"
        " drawn anew"
    )
