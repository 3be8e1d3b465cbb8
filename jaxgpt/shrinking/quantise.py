"""Weight-only quantisation: every matrix in 8 or 4 bits (see `ops.quantised`)."""

import math

import numpy as np

from jaxgpt.config import Config
from jaxgpt.model.weights import format_of
from jaxgpt.optim.groups import INPUTS_OUTPUTS
from jaxgpt.shrinking.source import Source, with_shrink
from jaxgpt.shrinking.spec import Options


def quantise(kind: str, source: Source, argument: None, options: Options) -> tuple[Config, dict]:
    """Returns the config and parameters of the model with its matrices as `kind`."""
    fields = dict(weights=kind, group=options.group, keep=options.keep)
    config = with_shrink(source.config, kind, **fields)
    return config, _quantised(source.params, config, "head")


def _quantised(node: dict, config: Config, owner: str) -> dict:
    """Returns the parameters `node` of the projection, table or module `owner`, quantised."""
    done = {}
    for name, child in node.items():
        if isinstance(child, dict):
            done[name] = _quantised(child, config, name)
        elif name in ("kernel", "tokens", "head") and (fmt := format_of(config.shrink, owner)):
            matrix, axis = as_matrix(owner, child)
            values, scales = fmt.quantise(matrix, axis)
            done[name] = {"values": values, "scales": scales}
        else:
            done[name] = child
    return done


def as_matrix(owner: str, array: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns a table [V, D], or stacked kernels as [L, I, O], and the axis of the inputs."""
    if owner not in INPUTS_OUTPUTS:
        return array, -1
    inputs, _ = INPUTS_OUTPUTS[owner]
    size = math.prod(array.shape[axis] for axis in inputs)
    return array.reshape(len(array), size, -1), -2
