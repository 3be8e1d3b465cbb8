"""The update against optax's own AdamW, the schedule by hand, and what decays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.config import ModelConfig, OptimConfig
from jaxgpt.model import ModelSpec
from jaxgpt.optim.groups import decay_mask
from jaxgpt.optim.optimizers import make_optimizer
from jaxgpt.optim.schedules import make_schedule
from tests.conftest import mesh_of, tiny_config


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_ten_steps_equal_optax_adamw(clip_norm):
    cfg = OptimConfig(
        learning_rate=0.1, warmup_steps=3, weight_decay=0.3, b1=0.8, b2=0.9, clip_norm=clip_norm
    )
    rng = np.random.default_rng(0)
    params = {"up": {"kernel": jnp.asarray(rng.normal(size=(3, 4))), "bias": jnp.asarray(rng.normal(size=4))}}
    reference = optax.adamw(
        make_schedule(cfg, 10), b1=0.8, b2=0.9, eps=cfg.eps, weight_decay=0.3,
        mask={"up": {"kernel": True, "bias": False}},
    )  # fmt: skip
    ours = make_optimizer(cfg, 10, ModelConfig())
    state, want_state, want = ours.init(params), reference.init(params), params
    for _ in range(10):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
        updates, state = ours.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
        assert norm > 1, "clipping must bite"
        scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
        clipped = jax.tree.map(lambda g, s=scale: g * s, grads)
        updates, want_state = reference.update(clipped, want_state, want)
        want = optax.apply_updates(want, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, want)


def test_schedules():
    def rates(**fields):
        cfg = OptimConfig(learning_rate=2.0, warmup_steps=4, final_lr_ratio=0.1, **fields)
        return [float(make_schedule(cfg, 12)(count)) for count in range(14)]

    cosine = rates(schedule="cosine")
    np.testing.assert_allclose(cosine[:4], [0.5, 1.0, 1.5, 2.0])
    middle = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 3 / 8)))
    np.testing.assert_allclose(cosine[6], middle, rtol=1e-6)
    np.testing.assert_allclose(cosine[11:], [0.2] * 3, rtol=1e-6)
    linear = rates(schedule="linear")
    np.testing.assert_allclose(linear[7], 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(linear[11], 0.2, rtol=1e-6)
    assert rates(schedule="constant")[4:] == [2.0] * 10
    no_warmup = OptimConfig(learning_rate=2.0, warmup_steps=0)
    assert float(make_schedule(no_warmup, 10)(0)) < 2.0, "the first step is already on the curve"


def test_every_parameter_is_covered_by_the_decay_mask():
    with jax.set_mesh(mesh_of(tiny_config())):
        abstract = jax.eval_shape(ModelSpec(tiny_config().model, "xla").init, jax.random.key(0))
    with pytest.raises(ValueError, match="no rule says whether parameter blocks/gain decays"):
        decay_mask({"blocks": {"gain": 1.0}})
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(abstract))
    decayed = {jax.tree_util.keystr(path, simple=True, separator="/") for path, d in mask if d}
    matrices = {"attention/query", "attention/key", "attention/value", "attention/out"}
    matrices |= {"mlp/up", "mlp/down"}
    kernels = {f"blocks/{name}/kernel" for name in matrices}
    assert decayed == {"tokens", "positions/kernel"} | kernels
    assert len(mask) == len(jax.tree.leaves(abstract))
