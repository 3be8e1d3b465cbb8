"""Zeros that stay zero under every optimizer, and pruning while training against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.config import ModelConfig, OptimConfig, ShrinkConfig
from jaxgpt.config.validate import changed, validate
from jaxgpt.optim.optimizers import DIRECTIONS, at_step, make_optimizer
from jaxgpt.optim.sparsity import share_at
from jaxgpt.system.errors import BadInput
from tests.conftest import mesh_of, tiny_config


def tree(rng) -> dict:
    kernel = rng.normal(size=(2, 6, 5)).astype(np.float32)
    kernel[rng.random(kernel.shape) < 0.5] = 0
    up = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros((2, 5))}
    return {"blocks": {"mlp": {"up": up}}, "tokens": jnp.zeros((7, 6))}


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
def test_zeros_stay_zero_to_the_bit(name):
    """Those of projections; a bias or an embedding that is 0 is trained."""
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh_of(tiny_config())):
        first = params = tree(rng)
        cfg = OptimConfig(name=name, learning_rate=0.1, warmup_steps=1, weight_decay=0.5)
        ours = make_optimizer(cfg, 10, ModelConfig(), ShrinkConfig(zeros="keep"))
        state = ours.init(params)
        for _ in range(3):
            grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
            updates, state = ours.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    before, after = (np.asarray(t["blocks"]["mlp"]["up"]["kernel"]) for t in (first, params))
    np.testing.assert_array_equal(after == 0, before == 0)
    assert (after != before)[before != 0].all()
    assert np.all(params["tokens"] != 0) and np.all(params["blocks"]["mlp"]["up"]["bias"] != 0)


def test_gradual_pruning_is_that_of_numpy():
    """Plain gradient descent, pruned by hand: the smallest of each layer's matrix, never to return;
    the count is the run's, so that a step that was skipped does not shift the schedule."""
    rng, shrink = np.random.default_rng(1), ShrinkConfig(sparsity=0.7)
    shrink.prune_from, shrink.prune_to, shrink.prune_every = 2, 9, 3
    cfg = OptimConfig(name="sgd", learning_rate=0.2, b1=0.0, warmup_steps=0, weight_decay=0.0)
    cfg.clip_norm, cfg.schedule = 0.0, "constant"
    with jax.set_mesh(mesh_of(tiny_config())):
        params = {"blocks": {"mlp": {"up": {"kernel": jnp.asarray(rng.normal(size=(2, 6, 5)))}}}}
        ours = make_optimizer(cfg, 12, ModelConfig(), shrink)
        update = jax.jit(ours.update)
        state, want, found = ours.init(params), np.array(jax.tree.leaves(params)[0]), []
        for step in (1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12):
            grad = rng.normal(size=want.shape).astype(np.float32)
            updates, state = update(
                jax.tree.map(lambda p, g=grad: jnp.asarray(g), params),
                at_step(state, jnp.int32(step - 1)),
                params,
            )
            params = optax.apply_updates(params, updates)
            want = np.where(want == 0, 0, want - np.float32(0.2) * grad)
            if step in (2, 5, 8, 9, 11):
                share = 0.7 * (1 - (1 - min((step - 2) / 7, 1)) ** 3)
                for layer in want.reshape(2, -1):
                    layer[np.argsort(np.abs(layer), kind="stable")[: round(share * 30)]] = 0
            found.append(np.array(jax.tree.leaves(params)[0]))
            np.testing.assert_allclose(found[-1], want, atol=1e-6)
            np.testing.assert_array_equal(found[-1] == 0, want == 0)
    assert [int(np.sum(a == 0)) for a in found] == [0, 0, 0, 34, 34, 34, 42, 42, 42, 42, 42]
    assert float(share_at(5, shrink, 9)) == pytest.approx(0.7 * (1 - (4 / 7) ** 3))


def test_gradual_pruning_is_the_same_on_a_mesh():
    rng, found = np.random.default_rng(2), []
    start, grad = rng.normal(size=(2, 2, 8, 12)).astype(np.float32)
    shrink = ShrinkConfig(sparsity=0.5, prune_every=1, prune_to=2)
    cfg = OptimConfig(name="sgd", weight_decay=0.0, warmup_steps=0)
    for shape in ((1, 1, 1), (2, 2, 2)):
        config = tiny_config(shape)
        with jax.set_mesh(mesh := mesh_of(config)):
            split = jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor"))
            params = {"blocks": {"mlp": {"up": {"kernel": jax.device_put(start, split)}}}}
            grads = {"blocks": {"mlp": {"up": {"kernel": jax.device_put(grad, split)}}}}
            ours = make_optimizer(cfg, 10, ModelConfig(), shrink)
            state, step = ours.init(params), jax.jit(ours.update)
            for _ in range(3):
                updates, state = step(grads, state, params)
                params = optax.apply_updates(params, updates)
            found.append(np.array(jax.tree.leaves(params)[0]))
    np.testing.assert_array_equal(*found)
    assert [int(np.sum(layer == 0)) for layer in found[0]] == [48, 48]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shrink.zeros": "keep", "lora.rank": 2}, "LoRA's additions would fill the zeros"),
        ({"shrink.sparsity": 0.5, "lora.rank": 2}, "LoRA's additions would fill the zeros"),
        ({"shrink.sparsity": 0.5, "shrink.prune_to": 11}, "not after num_steps=10"),
        ({"shrink.sparsity": 0.5, "shrink.prune_from": 8}, "prune_to=8 must lie after"),
        ({"shrink.sparsity": 0.5, "shrink.prune_to": 1}, "must lie after shrink.prune_from=1"),
        ({"shrink.sparsity": 0.5, "optim.ema_decay": 0.9}, "set optim.ema_decay=0"),
        ({"shrink.ranks": "up=8", "lora.rank": 2}, "the factors are small and trained themselves"),
        ({"shrink.ranks": "wte=8"}, "'wte=8' is not PROJECTION=RANK"),
        ({"shrink.sparsity": 1.0}, "shrink.sparsity=1.0 must be"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(BadInput, match=message):
        changed(tiny_config(), fields)
    assert validate(tiny_config()).shrink == ShrinkConfig()
    # how many steps there are is not known yet
    changed(tiny_config(), {"shrink.sparsity": 0.5, "shrink.prune_from": 8, "num_epochs": 9.0})
