"""The table of methods: `(source, argument, options) -> (config, params)` of the smaller model.

`argument` is what follows the method's name (0.25 of `heads:0.25`), `params` lie on the host. What
each may follow, and which arguments it takes, is in `spec.KINDS`.
"""

from collections.abc import Callable
from functools import partial

from jaxgpt.shrinking.low_rank import svd, tt
from jaxgpt.shrinking.prune import heads, layers, prune, prune24
from jaxgpt.shrinking.quantise import quantise

METHODS: dict[str, Callable] = {
    "layers": layers,
    "heads": heads,
    "prune": prune,
    "prune24": prune24,
    "svd": svd,
    "tt": tt,
    "int8": partial(quantise, "int8"),
    "int4": partial(quantise, "int4"),
    "nf4": partial(quantise, "nf4"),
}
