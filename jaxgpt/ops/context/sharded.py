"""The only `shard_map` around attention, and how it goes over the mesh axis `context`."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxgpt.config import Config
from jaxgpt.config.context import needing_all_keys
from jaxgpt.config.schema import BATCH_AXES
from jaxgpt.ops.attention import Kernel
from jaxgpt.ops.context import blocks
from jaxgpt.ops.context.gathered import cudnn_gathered, gathered, xla_gathered
from jaxgpt.ops.context.order import AXIS, is_split
from jaxgpt.ops.context.ring import Hop, ring
from jaxgpt.ops.context.splash import CHUNK, splash_gathered, splash_hop
from jaxgpt.ops.kernels import KERNELS, SAVED
from jaxgpt.ops.mask import AttentionMask
from jaxgpt.parallel.rules import AxisRules

XLA = Hop(blocks.forward, blocks.backward), xla_gathered
OVER_CONTEXT: dict[Kernel, tuple[Hop, Kernel]] = {  # of the others, patterns' included: XLA
    KERNELS["splash"]: (splash_hop(), splash_gathered),
    KERNELS["cudnn"]: (XLA[0], cudnn_gathered),
}
# Gathered keys and values of a layer, in bytes on a device, from which on they go around a ring.
# Their gradients are as large again
MOST_GATHERED = 256 * 2**20


def sharded(kernel: Kernel, rules: AxisRules, method: str = "auto", **fixed) -> Kernel:
    """Returns `kernel` run on each device's own sequences and heads, and on its own positions over
    `context`: by `method`, see `chosen`.

    `fixed` are the kernel's keyword arguments (scale, dropout). Beside the mask it is given `kept`
    and `bias` where there are any, of keys in natural order.
    """

    def attend(q, k, v, mask: AttentionMask, kept=None, bias=None):
        places = rules("batch", "seq")
        arrays, names = [q, k, v], ("heads", "kv_heads", "kv_heads")
        specs = [rules("batch", "seq", name, None) for name in names]
        rows = jax.tree.map(lambda a: places if a.ndim > 1 else rules("batch"), mask)
        more = {name: a for name, a in (("kept", kept), ("bias", bias)) if a is not None}
        each = {
            name: rules("batch" if a.shape[0] > 1 else None, "heads", "seq", None)
            for name, a in more.items()
        }
        run = functools.partial(kernel, **fixed)
        if is_split(places):
            run = over_context(kernel, method, **fixed)
        # Pallas says nothing of how its outputs vary over the mesh: they do as the queries do
        run = jax.shard_map(
            lambda q, k, v, mask, more, run=run: run(q, k, v, mask, **more),
            in_specs=(*specs, rows, each),
            out_specs=specs[0],
            check_vma=False,
        )
        return run(*arrays, mask, jax.sharding.reshard(more, each))

    return attend


def chosen(method: str, keys_bytes: int, needs_all_keys: bool) -> str:
    """Returns `ring` or `all_gather` for `compute.context_attention=method`.

    A ring sends each key as often as a gather does, while it computes, and holds two devices' keys
    instead of all; a gather is one collective, and allows any mask. So auto is a ring where the
    keys and values of all devices, `keys_bytes` on one, are more than `MOST_GATHERED`.
    """
    if needs_all_keys or method == "all_gather":
        return "all_gather"
    return "ring" if method == "ring" or keys_bytes > MOST_GATHERED else "all_gather"


def method_of(config: Config, mesh: Mapping[str, int]) -> str:
    """Returns how the layers with full attention train on a mesh of these sizes: `ring` or
    `all_gather`; "" where positions are not split."""
    model, devices = config.model, mesh[AXIS]
    if devices == 1:
        return ""
    rows = config.batch_size // config.grad_accum // math.prod(mesh[axis] for axis in BATCH_AXES)
    heads, size = model.num_kv_heads // mesh["tensor"], jnp.dtype(config.compute.dtype).itemsize
    keys_bytes = 2 * rows * model.max_seq_len * heads * model.head_dim * size
    needs_all_keys = needing_all_keys(config) != ""
    return chosen(config.compute.context_attention, keys_bytes, needs_all_keys)


def said(config: Config, mesh: Mapping[str, int], kernel: str) -> str:
    """Returns how attention goes over `context`, for people; "" where positions are not split."""
    if not (method := method_of(config, mesh)):
        return ""
    length = config.model.max_seq_len // mesh[AXIS]
    if kernel == "splash" and length % (2 * CHUNK):
        kernel = f"xla, as {length} tokens a device are no multiple of {2 * CHUNK}"
    elif kernel == "cudnn" and method == "ring":
        kernel = "xla: cuDNN's gradients need all keys"
    else:
        return f" over context by {method}"
    return f" over context by {method} ({kernel})"


def over_context(kernel: Kernel, method: str, *, scale: float, **fixed) -> Callable:
    """Returns what attends inside `shard_map` where positions are split."""

    def run(q, k, v, mask: AttentionMask, kept=None, bias=None):
        reach, devices = mask.reach, jax.lax.axis_size(AXIS)
        more = (reach.window or None, reach.pattern, mask.prefix, kept, bias)
        needs_all_keys = any(a is not None for a in more)
        whole = all(length % (2 * CHUNK) == 0 for length in (q.shape[1], k.shape[1]))
        hop, with_all = OVER_CONTEXT.get(kernel, XLA) if whole else XLA
        if chosen(method, 2 * k.nbytes * devices, needs_all_keys) == "all_gather":
            return gathered(q, k, v, mask, kept, bias, kernel=with_all, scale=scale, **fixed)
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q * scale, k, v))
        return ring(q, k, v, mask, hop, SAVED).transpose(0, 2, 1, 3)

    return run
