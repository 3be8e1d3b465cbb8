"""Attention: one signature, one kernel table, the only `shard_map` around kernels."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.config import BadInput
from jaxgpt.parallel.rules import AxisRules

Kernel = Callable[..., Float[Array, "B T N H"]]


def xla_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    q_positions: Int[Array, "B T"],
    kept: Bool[Array, "B N T S"] | None = None,
    dropout: float = 0.0,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k^T / sqrt(H)) v over keys at positions up to the query's.

    The reference: scores and softmax in float32. Key s stands at position s, so an unwritten
    slot of a cache lies in the future of every query and is masked like it. `kept` marks the
    attention weights that dropout keeps.
    """
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
    visible = jnp.arange(k.shape[1]) <= q_positions[:, None, :, None]
    scores = jnp.where(visible, scores / math.sqrt(q.shape[-1]), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if kept is not None:
        weights = jnp.where(kept, weights / (1 - dropout), 0)
    return jnp.einsum("BNTS,BSNH->BTNH", weights.astype(v.dtype), v)


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    q_positions: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Causal flash attention by cuDNN; bf16 or f16 only, positions must be 0..T-1 in order."""
    del q_positions  # causal from 0: the kernel's own mask
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


KERNELS: dict[str, Kernel] = {"xla": xla_attention, "cudnn": cudnn_attention}


def choose_kernel(name: str, platform: str, dtype: str, head_dim: int, dropout: float) -> str:
    """Returns the kernel that `model.attention=name` means on `platform` (`cpu`, `gpu`, `tpu`).

    Raises:
      BadInput: if a kernel is asked for by name that cannot run; there is no quiet fallback.
    """
    why_not = (
        f"the devices are {platform}, not gpu" if platform != "gpu"
        else f"model.dtype={dtype} is not bfloat16" if dtype != "bfloat16"
        else f"heads of width {head_dim} are not a multiple of 8 up to 128"
        if head_dim % 8 or head_dim > 128
        else "only 'xla' attention has dropout" if dropout
        else ""
    )  # fmt: skip
    if name == "cudnn" and why_not:
        raise BadInput(f"model.attention=cudnn cannot run: {why_not}; set model.attention=auto")
    if name == "auto":
        return "xla" if why_not else "cudnn"
    return name


def sharded(kernel: Kernel, rules: AxisRules, *, dropout: float = 0.0) -> Kernel:
    """Returns `kernel` run on each device's own sequences and heads; attention never mixes them."""
    heads = rules("batch", None, "heads", None)
    kept = rules("batch", "heads", None, None)

    def attend(q, k, v, q_positions, kept_weights=None):
        if kept_weights is None:
            specs = (heads, heads, heads, P(heads[0], None))
            return jax.shard_map(kernel, in_specs=specs, out_specs=heads)(q, k, v, q_positions)
        dropping = functools.partial(kernel, dropout=dropout)
        specs = (heads, heads, heads, P(heads[0], None), kept)
        return jax.shard_map(dropping, in_specs=specs, out_specs=heads)(
            q, k, v, q_positions, kept_weights
        )

    return attend
