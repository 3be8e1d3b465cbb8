"""Without a GPU: the train step with cuDNN attention lowers for CUDA, forward and backward.

What cuDNN computes is checked on a GPU only; this holds that our call, inside `shard_map`, under
`grad` and `scan`, with windows and grouped-query heads, is one that JAX accepts, and that the
window it asks cuDNN for is the reference's.
"""

import dataclasses
import re

import jax
import jax._src.cudnn.fused_attention_stablehlo as fused
import jax.numpy as jnp
import pytest

from jaxgpt.model import ModelSpec
from jaxgpt.ops.mask import AttentionMask
from jaxgpt.training.setup import make_training
from jaxgpt.training.step import make_train_step
from tests.conftest import mesh_of, tiny_config


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_the_train_step_lowers_for_cuda(shape, pack, monkeypatch):
    # the three questions JAX asks the driver that is not there
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *a, **k: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda *a, **k: False)
    config = tiny_config(
        shape,
        compute={"dtype": "bfloat16"},
        num_kv_heads=2,
        embed_dim=256,
        max_seq_len=128,
        window=32,
        position="rope",
    )
    config.data.pack = pack
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        training = dataclasses.replace(training, spec=ModelSpec(config, "cudnn"))
        step = make_train_step(training.spec, config)
        traced = step.trace(training.abstract_state(), training.abstract_batch())
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernel = "ScaleBiasSoftmax" if pack else "Softmax"  # packed documents come as a bias
    assert text.count(f"@__cudnn$fmha{kernel}(") == 1, "one forward kernel, in the scan over layers"
    assert text.count(f"@__cudnn$fmha{kernel}Backward(") == 1
    reach = 0 if pack else keys_seen(config.model.window)  # a bias has the window in it
    found = re.findall(r'sliding_window_length[\\22"]*: *(\d+)', text)
    assert found == [str(reach)] * 2, "cuDNN attends to (position - length, position]"


def keys_seen(window: int) -> int:
    """How many keys the reference's mask shows a query far from the start, itself included."""
    at = jnp.arange(4 * window)[None]
    return int(AttentionMask(at, at).within(window).visible()[0, -1].sum())
