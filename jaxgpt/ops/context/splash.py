"""The splash kernel with queries on several devices: one hop of a ring, and all keys gathered."""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jaxtyping import Array, Float

from jaxgpt.ops.context.order import AXIS
from jaxgpt.ops.context.ring import Hop
from jaxgpt.ops.kernels import LANES, SAVED, splash_kernel
from jaxgpt.ops.mask import AttentionMask

CHUNK = LANES  # what half a device's positions are a multiple of


def splash_hop(interpret: bool = False) -> Hop:
    """Returns splash as a hop; `interpret` runs it on any device, slowly."""

    def kernel_of(q, k, mask: AttentionMask):
        shape = q.shape[2], k.shape[2]
        return splash_kernel(
            shape, q.shape[1], mask.reach, interpret=interpret, with_logsumexp=True
        )

    def forward(q, k, v, mask):
        out, (lse,) = jax.vmap(kernel_of(q, k, mask))(q, k, v, *_segments(mask))
        return out, lse

    def backward(q, k, v, mask, out, lse, grad_out):
        # JAX gives the kernels' gradients only with the logsumexp of these keys alone; the ring's
        # is that of all keys
        kernel, segments = kernel_of(q, k, mask), (*_segments(mask), None)[:1]
        infos = kernel.dq_mask_info, kernel.dkv_mask_info

        def one(q, k, v, out, lse, grad_out, segments):
            saved = q, k, v, segments, None, out, lse, *infos
            return kernels._splash_attention_bwd(**kernel.kwargs, res=saved, do=grad_out)[3:6]

        return jax.vmap(one)(q, k, v, out, lse, grad_out, *segments)

    return Hop(forward, backward)


def splash_gathered(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns the attention of a device's queries to the keys of all, in natural order; inside
    `shard_map`. Blocks that nobody sees are skipped."""
    devices, length = jax.lax.axis_size(AXIS), k.shape[1]
    kernel = splash_kernel(
        (q.shape[1] * devices, length),
        q.shape[2],
        mask.reach,
        interpret=interpret,
        devices=devices,
        name=SAVED,
    )
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q * scale, k, v))
    out = jax.vmap(_own_part(kernel, devices))(q, k, v, *_segments(mask))
    return out.transpose(0, 2, 1, 3)


def _segments(mask: AttentionMask) -> tuple:
    there = mask.q_segments is not None
    return (kernels.SegmentIds(mask.q_segments, mask.kv_segments),) if there else ()


def _own_part(kernel, devices: int):
    """Returns the kernel of this device's queries."""

    def cut(a, axis):
        size = a.shape[axis] // devices
        return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index(AXIS) * size, size, axis)

    def part(info):
        names = [
            name
            for name in ("data_next", "mask_next", "block_mask")
            if getattr(info, name) is not None
        ]
        info = info._replace(**{name: cut(getattr(info, name), 1) for name in names})
        if info.q_sequence is None:
            return info
        return info._replace(q_sequence=cut(info.q_sequence, 0))

    infos = map(part, (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info))
    return kernels.SplashAttentionKernel(*infos, **kernel.kwargs)
