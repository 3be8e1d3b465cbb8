"""What a layer keeps for the backward pass, by `compute.remat`; the rest is computed again."""

import jax

from jaxgpt.ops.kernels import SAVED
from jaxgpt.parallel.fsdp import GATHERED

RESIDUAL_STREAM = "residual_stream"  # what each layer is given
_policies = jax.checkpoint_policies


def all_but_gathered_weights(primitive, *_, **params) -> bool:
    """Says whether to keep a result: all but those named `GATHERED`, and the all-gathers before the
    name. (JAX's `save_anything_except_these_names` keeps everything.)"""
    return primitive.name != "all_gather" and params.get("name") != GATHERED


REMAT = {
    "none": all_but_gathered_weights,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(SAVED)
    ),
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL_STREAM],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
