"""Methods that remove weights, heads and feed-forward columns, or layers."""

import dataclasses
import itertools
from functools import partial

import numpy as np

from jaxgpt.config import Config
from jaxgpt.shrinking import structure
from jaxgpt.shrinking.calibration import input_moments
from jaxgpt.shrinking.masks import keep_largest, keep_two_of_four, scores
from jaxgpt.shrinking.quantise import as_matrix, projections, with_kernels
from jaxgpt.shrinking.source import Source, with_shrink
from jaxgpt.shrinking.spec import Options
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput


def prune(source: Source, share: float, options: Options) -> tuple[Config, dict]:
    """Returns the model with a share of each projection's weights zero: the least important of each
    output (Wanda), or by magnitude those of the whole matrix."""
    by_output = source.calibration(options.calibration) > 0
    keep = partial(keep_largest, share=share, by_output=by_output)
    return _masked(source, f"prune:{share:g}", keep, options)


def prune24(source: Source, argument: None, options: Options) -> tuple[Config, dict]:
    """Returns the model with two of every four neighbouring inputs' weights zero."""
    return _masked(source, "prune24", keep_two_of_four, options)


def _masked(source: Source, name: str, keep, options: Options) -> tuple[Config, dict]:
    count = source.calibration(options.calibration)
    say(f"importance  {f'Wanda over {count} windows' if count else 'magnitude'} of each weight")
    moments = input_moments(source, count) if count else itertools.repeat({})
    kernels = {name: np.array(k) for name, k in projections(source.params["blocks"])}
    for layer, found in zip(range(source.config.model.num_layers), moments, strict=False):
        for owner, kernel in kernels.items():
            matrix = as_matrix(owner, kernel)[0][layer]
            norms = np.sqrt(np.diag(found[owner])) if count else None
            kernel[layer] *= keep(scores(matrix, norms)).reshape(kernel.shape[1:])
    config = with_shrink(source.config, name, zeros="keep")
    return config, with_kernels(source.params, kernels)


def heads(source: Source, share: float, options: Options) -> tuple[Config, dict]:
    """Returns the model without the least important share of its heads (of grouped-query attention:
    of its key heads, with their query heads) and of its feed-forward columns, in every layer as
    many. Raises `BadInput` if that is no head or all of them."""
    cfg, name = source.config.model, f"heads:{share:g}"
    removed = round(share * cfg.num_kv_heads)
    if not 0 < removed < cfg.num_kv_heads or round(share * cfg.mlp_dim) in (0, cfg.mlp_dim):
        raise BadInput(
            f"--method={name} removes {removed} of {cfg.num_kv_heads} heads:"
            f" choose a share from {1 / cfg.num_kv_heads:.3g} to {1 - 1 / cfg.num_kv_heads:.3g}"
            if cfg.num_kv_heads > 1
            else f"--method={name}: the model has one head, which has to stay"
        )
    structure.check_heads_alone(cfg)
    windows = source.windows(_needed(source, options, name), 1)
    groups, columns = structure.gate_importance(source.spec, source.params, list(windows))
    groups, columns = (structure.most_important(a, share) for a in (groups, columns))
    params, model = structure.without_heads_and_columns(source.params, cfg, groups, columns)
    say(
        f"removed     {cfg.num_heads - model.num_heads} of {cfg.num_heads} heads and"
        f" {cfg.mlp_dim - model.mlp_dim} of {cfg.mlp_dim} columns in each layer"
    )
    return dataclasses.replace(with_shrink(source.config, name), model=model), params


def layers(source: Source, share: float, options: Options) -> tuple[Config, dict]:
    """Returns the model without the share of its layers that turn their input least. Raises
    `BadInput` if that is no layer or all of them, or layers are not alike."""
    cfg, name = source.config.model, f"layers:{share:g}"
    removed = round(share * cfg.num_layers)
    if not 0 < removed < cfg.num_layers:
        raise BadInput(f"--method={name} removes {removed} of {cfg.num_layers} layers")
    structure.check_layers_alike(cfg)
    influence = structure.block_influence(source, _needed(source, options, name))
    kept = structure.most_important(influence[None], share)[0]
    say(f"removed     layers {sorted({*range(cfg.num_layers)} - {*kept.tolist()})}, counted from 0")
    params, model = structure.without_layers(source.params, cfg, kept)
    return dataclasses.replace(with_shrink(source.config, name), model=model), params


def _needed(source: Source, options: Options, method: str) -> int:
    """Returns the number of calibration windows. Raises `BadInput` if there are none."""
    if count := source.calibration(options.calibration):
        return count
    raise BadInput(
        f"--method={method} needs text to measure with: set --calibration above 0, and"
        " --data=SOURCE for an imported model"
    )
