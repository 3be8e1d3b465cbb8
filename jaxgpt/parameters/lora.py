"""Low-rank additions to frozen matrices: LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Float

from jaxgpt.config import LoraConfig
from jaxgpt.parallel.rules import rowwise, weight
from jaxgpt.parallel.specs import unsharded

NAMES = ("lora_in", "lora_out", "magnitude")  # the last word of an addition's path


def is_addition(path: str) -> bool:
    """Says whether a parameter belongs to an addition."""
    return path.split("/")[-1] in NAMES


def add(
    y, x, equation: str, dense: Callable, adapter: dict, scale: float, out: P
) -> Float[Array, "..."]:
    """Returns y = x W with the addition: y + scale * x A B; under DoRA, each output times its
    magnitude over the norm of its column of W + scale * A B (a constant to the gradient, 4.3), for
    W = `dense()`."""
    rows, letters, result = _split(equation)
    low = rowwise(
        f"{rows},{letters[: _inputs(equation)]}R->MR",
        x,
        weight(adapter["lora_in"], x.dtype),
        P(out[0], out[1], None),
    )
    lora_out = weight(adapter["lora_out"], x.dtype)
    y = y + scale * rowwise(f"MR,R{result[1:]}->{result}", low, lora_out, out)
    if adapter.get("magnitude") is None:
        return y
    kernel, lora_in = dense(), weight(adapter["lora_in"], jnp.float32)
    axes = tuple(range(_inputs(equation)))
    added = jnp.einsum(
        f"{letters[: len(axes)]}R,R{result[1:]}->{letters}",
        lora_in,
        lora_out.astype(jnp.float32),
        out_sharding=jax.typeof(kernel).sharding.spec,
    )
    whole = kernel.astype(jnp.float32) + scale * added
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(jnp.square(whole), axis=axes)))
    magnitude = reshard(adapter["magnitude"][...], P(*out[2:]))
    return y * (magnitude / reshard(norm, P(*out[2:]))).astype(y.dtype)


def _split(equation: str) -> tuple[str, str, str]:
    inputs, result = equation.split("->")
    rows, letters = inputs.split(",")
    return rows, letters, result


def _inputs(equation: str) -> int:
    """How many of the kernel's axes are inputs: 2 of NHD in "MNH,NHD->MD"."""
    return len(_split(equation)[0]) - 1


def column_norms(kernel: np.ndarray, magnitude_shape: tuple) -> np.ndarray:
    """Returns the column norms of stacked kernels [L, in..., out...], shaped [L, out...]."""
    layers = kernel.shape[0]
    flat = np.asarray(kernel, np.float32).reshape(layers, -1, int(np.prod(magnitude_shape[1:])))
    return np.sqrt(np.sum(np.square(flat), axis=1)).reshape(magnitude_shape)


def merge(params: dict, cfg: LoraConfig) -> dict:
    """Returns the parameters with every addition in its matrix, on the host; as they are, without.

    They fit the same config with `lora.rank` = 0.
    """
    if not cfg.rank:
        return params

    def merge_node(node):
        if not isinstance(node, dict):
            return node
        if "lora_in" not in node:
            return {name: merge_node(child) for name, child in node.items()}
        kernel = np.asarray(node["kernel"])
        layers, rank = kernel.shape[0], cfg.rank
        lora_in = np.asarray(node["lora_in"], np.float32).reshape(layers, -1, rank)
        lora_out = np.asarray(node["lora_out"], np.float32).reshape(layers, rank, -1)
        whole = kernel.astype(np.float32).reshape(layers, lora_in.shape[1], -1)
        whole = whole + (cfg.alpha / rank) * (lora_in @ lora_out)
        if "magnitude" in node:
            size = np.asarray(node["magnitude"], np.float32).reshape(layers, 1, -1)
            whole = whole * size / np.sqrt(np.sum(np.square(whole), axis=1, keepdims=True))
        rest = {name: leaf for name, leaf in node.items() if name not in NAMES}
        return rest | {"kernel": whole.reshape(kernel.shape).astype(kernel.dtype)}

    return merge_node(params)


def make_adapter(linear_shape, inputs: int, specs: P, cfg: LoraConfig, dtype, key) -> dict:
    """Returns an addition's parameters: A from N(0, 1/in), B zero, magnitudes one."""
    shape, spec = list(linear_shape), list(specs)
    std = float(np.prod(shape[:inputs])) ** -0.5
    lora_in = jax.nn.initializers.normal(std)(
        key, (*shape[:inputs], cfg.rank), dtype, out_sharding=P(*spec[:inputs], None)
    )
    lora_out = jnp.zeros((cfg.rank, *shape[inputs:]), dtype, out_sharding=P(None, *spec[inputs:]))
    adapter = {"lora_in": nnx.Param(lora_in), "lora_out": nnx.Param(lora_out)}
    if cfg.dora:
        ones = jnp.ones(shape[inputs:], dtype, out_sharding=unsharded(P(*spec[inputs:])))
        adapter["magnitude"] = nnx.Param(ones)
    return adapter
