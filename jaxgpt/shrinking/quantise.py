"""Weight-only quantisation: every matrix in 8 or 4 bits (see `parameters.quantised`)."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from jaxgpt.config import Config, ShrinkConfig
from jaxgpt.optim.groups import INPUTS_OUTPUTS
from jaxgpt.parameters.weights import format_of
from jaxgpt.shrinking.calibration import input_moments
from jaxgpt.shrinking.gptq import gptq
from jaxgpt.shrinking.source import Source, with_shrink
from jaxgpt.shrinking.spec import Options

MATRICES = ("kernel", "factor_in", "factor_out", "tokens", "head")  # the last words of their paths
PARTS = ("values", "scales")  # what is stored of each


def quantise(kind: str, source: Source, argument: None, options: Options) -> tuple[Config, dict]:
    """Returns the config and parameters of the model with its matrices as `kind`, rounded by GPTQ
    on windows of training text (see `gptq`), or, for none, to the nearest."""
    fields = dict(weights=kind, group=options.group, keep=options.keep)
    config = with_shrink(source.config, kind, **fields)
    compute = dataclasses.replace(config.compute, fake_quantise="none", matmul="plain")
    config = dataclasses.replace(config, compute=compute)
    if not options.calibration:
        return config, nearest(source.params, config.shrink, "head")
    return config, _calibrated(source, config.shrink, options.calibration)


def nearest(node: dict, cfg: ShrinkConfig, owner: str) -> dict:
    """Returns the parameters of the projection, table or module `owner`, each weight rounded to the
    nearest."""
    done = {}
    for name, child in node.items():
        if isinstance(child, dict):
            done[name] = nearest(child, cfg, owner if name == "kernel" else name)
        elif name in MATRICES and (fmt := format_of(cfg, owner)):
            matrix, axis = as_matrix(owner, child, name)
            done[name] = dict(zip(PARTS, fmt.quantise(matrix, axis), strict=True))
        else:
            done[name] = child
    return done


def _calibrated(source: Source, cfg: ShrinkConfig, windows: int) -> dict:
    """Returns the parameters with projections and the head's table rounded by GPTQ, the other
    tables to the nearest."""
    done = nearest(source.params, cfg, "head")
    kernels = dict(projections(source.params["blocks"]))
    stored = dict(projections(done["blocks"]))
    head = "head" if "head" in done else "tokens"
    for layer, moments in enumerate(input_moments(source, windows)):
        for owner, moment in moments.items():
            if not (fmt := format_of(cfg, owner)):
                continue
            if owner == "head":
                if isinstance(source.params[head], dict):  # cores, which stay floats
                    continue
                parts = gptq(fmt, source.params[head].T, moment)
                done[head] = {name: a.T for name, a in zip(PARTS, parts, strict=True)}
                continue
            if isinstance(kernels[owner], dict):  # two factors: rounded to the nearest
                continue
            matrix, _ = as_matrix(owner, kernels[owner])
            for name, a in zip(PARTS, gptq(fmt, matrix[layer], moment), strict=True):
                stored[owner][name][layer] = a
    return done


def projections(node: dict, owner: str = "") -> Iterator[tuple[str, np.ndarray | dict]]:
    """Yields the (name, kernel) of every projection in the parameters of the blocks."""
    for name, child in node.items():
        if name == "kernel":
            yield owner, child
        elif isinstance(child, dict):
            yield from projections(child, name)


def with_kernels(params: dict, kernels: dict) -> dict:
    """Returns the parameters with these in place of the projections' kernels, by name."""

    def replaced(node: dict, owner: str) -> dict:
        new = {
            name: replaced(child, name) if isinstance(child, dict) else child
            for name, child in node.items()
        }
        return new | {"kernel": kernels[owner]} if owner in kernels else new

    return params | {"blocks": replaced(params["blocks"], "")}


def as_matrix(owner: str, array: np.ndarray, name: str = "kernel") -> tuple[np.ndarray, int]:
    """Returns a table [V, D], or stacked kernels or factors as [L, I, O], and the axis of the
    inputs."""
    if owner not in INPUTS_OUTPUTS:
        return array, -1
    first_output = {"factor_in": array.ndim - 1, "factor_out": 2}.get(name)
    first_output = first_output or INPUTS_OUTPUTS[owner][1][0]
    return array.reshape(len(array), math.prod(array.shape[1:first_output]), -1), -2
