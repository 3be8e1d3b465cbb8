"""What a layer keeps for the backward pass, by `model.remat`; the rest is computed again."""

import jax

from jaxgpt.ops.splash import RESIDUALS
from jaxgpt.parallel.fsdp import GATHERED

RESIDUAL = "residual_stream"  # what each layer is given
_policies = jax.checkpoint_policies
REMAT = {
    "none": _policies.save_anything_except_these_names(GATHERED),
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(RESIDUALS)
    ),
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[RESIDUAL],
        offload_src="device", offload_dst="pinned_host",
    ),
}
