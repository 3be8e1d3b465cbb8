"""Attention: one signature, one kernel table, the only `shard_map` around kernels."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgpt.ops.mask import AttentionMask
from jaxgpt.ops.splash import splash_attention
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.system.errors import BadInput

Kernel = Callable[..., Float[Array, "B T N H"]]
BLOCK, MAX_BLOCKS = 64, 8  # of `blocked_attention`: queries of a block at least, blocks at most


def xla_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    kept: Bool[Array, "B N T S"] | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scale * q k^T) v over the visible keys: the reference.

    Scores and softmax in float32. Query head n reads key head n // (N/K). `kept` marks the
    attention weights that dropout keeps. Heads are brought in front of positions first: XLA's
    CPU backend multiplies them twice as fast that way, and elsewhere it makes no difference.
    """
    (b, t, n, h), (s, heads) = q.shape, k.shape[1:3]
    groups = n // heads
    q = q.reshape(b, t, heads, groups, h).transpose(0, 2, 3, 1, 4).reshape(b, heads, groups * t, h)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKMH,BKSH->BKMS", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, heads, groups, t, s) * scale
    visible = mask.visible()[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
    if kept is not None:
        weights = jnp.where(kept.reshape(weights.shape), weights / (1 - dropout), 0)
    weights = weights.astype(v.dtype).reshape(b, heads, groups * t, s)
    out = jnp.einsum("BKMS,BKSH->BKMH", weights, v).reshape(b, heads, groups, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def blocked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    kept: Bool[Array, "B N T S"] | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Array, "B T N H"]:
    """`xla_attention` by blocks of queries, each with no other keys than a causal mask may show it.

    Positions must grow along a row, segments or not. More blocks skip more keys, up to half of all,
    and take longer to compile.
    """
    length, reach = q.shape[1], mask.reach
    if not reach.causal or mask.prefix is not None or k.shape[1] != length:
        return xla_attention(q, k, v, mask, kept, scale=scale, dropout=dropout)
    size = max(BLOCK, -(-length // MAX_BLOCKS))
    outs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        queries = slice(start, end)
        keys = slice(max(start - reach.window + 1, 0) if reach.window else 0, end)
        outs.append(
            xla_attention(
                q[:, queries],
                k[:, keys],
                v[:, keys],
                mask.part(queries, keys),
                None if kept is None else kept[:, :, queries, keys],
                scale=scale,
                dropout=dropout,
            )
        )
    return jnp.concatenate(outs, axis=1)


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: AttentionMask,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Flash attention by cuDNN: 16-bit floats; without segments, positions 0..T-1 in order.

    What cuDNN cannot express (segments, a prefix, a window on both sides) goes in as a mask
    [B, 1, T, T], one bit a pair, which it reads as a bias.
    """
    attend = functools.partial(
        jax.nn.dot_product_attention, q, k, v, scale=scale, implementation="cudnn"
    )
    causal, window = mask.reach.causal, mask.reach.window
    if mask.q_segments is not None or mask.prefix is not None or (window and not causal):
        return attend(mask=mask.visible()[:, None])
    return attend(is_causal=causal, local_window_size=(window - 1, 0) if window else None)


KERNELS: dict[str, Kernel] = {
    "xla": blocked_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}
NATIVE = {"gpu": "cudnn", "tpu": "splash"}  # each platform's flash kernel


def choose_kernel(name: str, platform: str, dtype: str, head_dim: int, dropout: float) -> str:
    """Returns the kernel that `compute.attention=name` means on `platform` (`cpu`, `gpu`, `tpu`).
    Raises `BadInput` if a kernel is asked for by name that cannot run; there is no quiet fallback.
    """
    wanted = NATIVE.get(platform, "xla") if name == "auto" else name
    needed = {kernel: platform for platform, kernel in NATIVE.items()}.get(wanted, platform)
    why_not = (
        ""
        if wanted == "xla"
        else f"the devices are {platform}, not {needed}"
        if platform != needed
        else "only 'xla' attention has dropout"
        if dropout
        else f"compute.dtype={dtype} is not a 16-bit float"
        if wanted == "cudnn" and dtype == "float32"
        else f"heads of width {head_dim} are not a multiple of 8 up to 128"
        if wanted == "cudnn" and (head_dim % 8 or head_dim > 128)
        else ""
    )
    if why_not and name != "auto":
        raise BadInput(
            f"compute.attention={name} cannot run: {why_not}; set compute.attention=auto"
        )
    return "xla" if why_not else wanted


def sharded(kernel: Kernel, rules: AxisRules, **fixed) -> Kernel:
    """Returns `kernel` run on each device's own sequences and heads; attention never mixes them.

    `fixed` are the kernel's keyword arguments (scale, dropout).
    """
    kernel = functools.partial(kernel, **fixed)
    queries, keys = rules("batch", None, "heads", None), rules("batch", None, "kv_heads", None)
    kept = rules("batch", "heads", None, None)

    def attend(q, k, v, mask: AttentionMask, *kept_weights):
        rows = jax.tree.map(lambda a: rules("batch", *(None,) * (a.ndim - 1)), mask)
        specs = (queries, keys, keys, rows) + (kept,) * len(kept_weights)
        # Pallas says nothing of how its outputs vary over the mesh: they do as the queries do
        run = jax.shard_map(kernel, in_specs=specs, out_specs=queries, check_vma=False)
        return run(q, k, v, mask, *kept_weights)

    return attend


def default_scale(head_dim: int, mup: bool) -> float:
    """Returns 1/sqrt(H); under muP 1/H (arXiv:2203.03466, definition 4.1), equal at H = 64."""
    return 8.0 / head_dim if mup else 1 / math.sqrt(head_dim)
