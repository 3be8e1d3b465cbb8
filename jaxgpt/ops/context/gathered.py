"""Attention of each device's queries to keys and values gathered from all devices of `context`.

Any mask, dropout of attention weights and bias of the scores work here. The gradients of keys and
values go back by reduce-scatter.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.ops.attention import Kernel, xla_attention
from jaxgpt.ops.context import blocks
from jaxgpt.ops.context.order import AXIS, natural, zigzag
from jaxgpt.ops.mask import AttentionMask


def gathered(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    kept: Array | None = None,
    bias: Array | None = None,
    *,
    kernel: Kernel,
    **fixed,
) -> Float[Array, "B T N H"]:
    """Returns `kernel`'s attention to all keys; inside `shard_map`. `kept` and `bias` are of this
    device's queries and of all keys in natural order."""
    causal = mask.reach.causal
    k, v = gather(k, causal), gather(v, causal)
    positions, segments = (
        None if a is None else gather(a, causal) for a in (mask.kv_positions, mask.kv_segments)
    )
    mask = mask._replace(kv_positions=positions, kv_segments=segments)
    more = {name: a for name, a in (("kept", kept), ("bias", bias)) if a is not None}
    return kernel(q, k, v, mask, **more, **fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(a: Array, in_zigzag: bool) -> Array:
    """Returns the parts [B, T, ...] of all devices, joined in natural order."""
    devices = jax.lax.axis_size(AXIS)
    a = jnp.moveaxis(jax.lax.all_gather(a, AXIS), 0, 1)
    a = jax.lax.reshape(a, (a.shape[0], devices * a.shape[2], *a.shape[3:]))
    return natural(a, 1, devices) if in_zigzag else a


def _scatter(in_zigzag: bool, _, grad: Array) -> tuple[Array]:
    devices = jax.lax.axis_size(AXIS)
    a = jnp.moveaxis(grad, 1, 0)
    if in_zigzag:
        a = zigzag(a, devices)
    a = a.reshape(devices, a.shape[0] // devices, *a.shape[1:])
    return (jnp.moveaxis(jax.lax.psum_scatter(a, AXIS), 0, 1),)


gather.defvjp(lambda a, in_zigzag: (gather(a, in_zigzag), None), _scatter)


def xla_gathered(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    kept: Array | None = None,
    bias: Array | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Array, "B T N H"]:
    """Returns `xla_attention`, by blocks unless `kept` or `bias` is as large as the scores."""
    if kept is not None or bias is not None:
        return xla_attention(q, k, v, mask, kept, bias, scale=scale, dropout=dropout)
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q * scale, k, v))
    return blocks.attend(q, k, v, mask).transpose(0, 2, 1, 3)


def cudnn_gathered(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Returns cuDNN's attention under a mask [B, 1, T, S], as no causal mask of its own starts
    where this device's queries do."""
    seen = mask.visible()[:, None]
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return attend(q, k, v, mask=seen, scale=scale)
