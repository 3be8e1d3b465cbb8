"""What some recipes add to a step: averages, loss scaling, muP, every optimizer on a mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config import Config, OptimConfig
from jaxgpt.config.schema import IGNORE
from jaxgpt.model import ModelSpec
from jaxgpt.objectives import language as objectives
from jaxgpt.ops.mask import AttentionMask
from jaxgpt.training import loss_scale
from jaxgpt.training import step as step_module
from jaxgpt.training.setup import make_training
from tests.conftest import mesh_of, random_batch, tiny_config


def train(config: Config, steps: int = 6, same_batch: bool = False, batches=None):
    """(losses, states as NumPy) of a few steps on random batches or those given."""
    metrics, states = train_on(config, steps, same_batch, batches)
    return metrics["loss"], states


def train_on(config: Config, steps: int = 6, same_batch: bool = False, batches=None):
    """({metric: its values}, states as NumPy), as `train`."""
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        state, step, found = jax.jit(training.init)(), training.compile_step(), []
        states = [jax.tree.map(np.array, state)]
        for k in range(steps):
            host = batches[k] if batches else random_batch(config, seed=0 if same_batch else k)
            batch = {n: jax.device_put(a, training.batch_sharding) for n, a in host.items()}
            state, metrics = step(state, batch)
            found.append({name: float(value) for name, value in metrics.items()})
            states.append(jax.tree.map(np.array, state))
    return {name: np.array([row[name] for row in found]) for name in found[0]}, states


def test_ema_is_the_average_of_the_weights():
    config = tiny_config()
    config.optim.ema_decay = 0.8
    _, states = train(config)
    want = states[0].params
    for state in states[1:]:
        want = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, want, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), states[-1].ema, want)
    assert states[-1].best_params is states[-1].ema
    _, plain = train(tiny_config())
    assert plain[-1].best_params is plain[-1].params
    # two programs round differently, and Adam makes steps of 1e-2 of it
    same = partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    jax.tree.map(same, plain[-1].params, states[-1].params)


def test_ema_of_bfloat16_weights_moves_in_float32(tmp_path):
    """A decay of 0.999 is 1 in bfloat16; a checkpoint that kept the average in it still loads."""
    config = tiny_config(compute={"param_dtype": "bfloat16"})
    config.optim.ema_decay = 0.999
    _, states = train(config, steps=3)
    want = jax.tree.map(lambda p: np.asarray(p, np.float64), states[0].params)
    for state in states[1:]:
        want = jax.tree.map(
            lambda a, p: 0.999 * a + 0.001 * np.asarray(p, np.float64), want, state.params
        )
    last = states[-1]
    for ema, average, first in zip(*map(jax.tree.leaves, (last.ema, want, states[0].params))):
        assert ema.dtype == np.float32
        np.testing.assert_allclose(ema, average, rtol=1e-6, atol=1e-9)
        assert np.any(ema != np.asarray(first, np.float32))
    with jax.set_mesh(mesh := mesh_of(config)):
        abstract = make_training(config, mesh).abstract_state()
        old = dataclasses.replace(
            last, ema=jax.tree.map(lambda a: a.astype(jnp.bfloat16), last.ema)
        )
        for name, state in (("new", last), ("old", old)):
            checkpoints = Checkpoints(tmp_path / name, keep=1)
            checkpoints.save(3, jax.tree.map(jnp.asarray, state), {"tokens": 0})
            checkpoints.close()
            reader = Checkpoints(tmp_path / name, read_only=True)
            whole, _ = reader.restore(3, abstract)
            alone = reader.restore_params(3, abstract.params, average=True)
            for found in (whole.ema, alone):
                jax.tree.map(
                    lambda a, b: np.testing.assert_array_equal(
                        a, b.astype(np.float32), strict=True
                    ),
                    found,
                    state.ema,
                )


def plain_sgd(**optim) -> dict:
    """Fields of an optimizer whose update is minus the rate times the (clipped) gradient."""
    return dict(name="sgd", b1=0.0, weight_decay=0.0, clip_norm=0.0, warmup_steps=0) | optim


def change(before, after) -> np.ndarray:
    """How far the parameters moved, as one vector."""
    moves = jax.tree.map(lambda a, b: np.ravel(b - a), before.params, after.params)
    return np.concatenate(jax.tree.leaves(moves))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_update_against_plain_autodiff(dtype):
    """Uneven microbatches, z-loss, clipping, decay: the update and what is logged of it equal those
    from whole float32 logits of the batch in one piece."""
    config = dataclasses.replace(tiny_config(compute={"dtype": dtype}), grad_accum=2)
    fields = plain_sgd(weight_decay=0.1, clip_norm=0.5, z_loss=0.05, schedule="constant")
    config.optim = OptimConfig(learning_rate=0.5, **fields)
    batch = {name: a.copy() for name, a in random_batch(config).items()}
    batch["targets"][0, :2] = batch["targets"][1, 1, 3:] = IGNORE
    found, (before, after) = train_on(config, 1, batches=[batch])
    plain = tiny_config()
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(plain, "xla")
        inputs, targets = (jnp.asarray(a.reshape(8, -1)) for a in batch.values())

        def total(params):
            logits = jax.sharding.reshard(spec.bind(params)(inputs), jax.P(None, None, None))
            logits = logits[..., : plain.model.vocab_size]
            lse = jax.nn.logsumexp(logits, axis=-1)
            right = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
            counted = targets != IGNORE
            loss = jnp.mean(lse - right, where=counted)
            return loss + 0.05 * jnp.mean(lse**2, where=counted), loss

        grads, loss = jax.jit(jax.grad(total, has_aux=True))(before.params)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
    assert norm > 0.5, "clipping must bite"
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, p: 0.0 * p if path[-1].key in ("bias", "scale") else 0.1 * p, before.params
    )
    want = jax.tree.map(lambda g, d: np.ravel(-0.5 * (g * 0.5 / norm + d)), grads, decayed)
    want, got = np.concatenate(jax.tree.leaves(want)), change(before, after)
    close = 1e-5 if dtype == "float32" else 2e-2  # of float16's 11 bits some are lost on the way
    assert np.linalg.norm(got - want) < close * np.linalg.norm(want)
    np.testing.assert_allclose(found["loss"], loss, rtol=close)
    np.testing.assert_allclose(found["grad_norm"], norm, rtol=close)
    assert found["learning_rate"] == [0.5]


def test_float16_keeps_the_gradients_of_few_targets():
    """One target of 2 x 4 x 24 positions, at a scale at which a 192nd of its gradients is 0."""
    norms = {}
    for dtype in ("float32", "float16"):
        config = tiny_config(num_layers=1, compute={"dtype": dtype})
        config.grad_accum = 2
        batch = random_batch(config)
        batch["targets"][:] = IGNORE
        batch["targets"][1, 2, 5] = 7
        with jax.set_mesh(mesh := mesh_of(config)):
            run = make_training(config, mesh)
            state = run.first_state()
            if dtype == "float16":
                small = state.loss_scale | {"scale": jnp.float32(2.0**-14)}
                state = dataclasses.replace(state, loss_scale=small)
            metrics = run.compile_step()(state, jax.device_put(batch, run.batch_sharding))[1]
            norms[dtype] = float(metrics["grad_norm"])
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.02), norms


def test_many_microbatches_of_bfloat16_gradients_add_up():
    params = {"w": jnp.ones(3, jnp.bfloat16), "frozen": None}
    one = ({"w": jnp.ones(3, jnp.bfloat16), "frozen": None}, jnp.float32(0.5))
    batch = {"inputs": jnp.zeros((512, 1, 1), jnp.int32)}
    summed = jax.jit(lambda: step_module._sum_over_microbatches(lambda m, i: one, batch, params))
    grads, loss = summed()
    assert grads["w"].dtype == jnp.float32 and np.all(np.asarray(grads["w"], float) == 512)
    assert loss == 256


def test_the_logged_learning_rate_is_the_applied_one_and_reaches_its_end(monkeypatch):
    """Five of twenty steps are skipped: their updates are lost, the schedule does not wait."""
    honest = objectives.hidden_and_figures
    poison, bad_steps = 77, {3, 4, 9, 15, 16}

    def poisoned(model, micro, key):
        x, figures = honest(model, micro, key)
        return jnp.where(jnp.all(micro["inputs"] == poison), jnp.nan, x), figures

    monkeypatch.setattr(objectives, "hidden_and_figures", poisoned)
    config = dataclasses.replace(tiny_config(num_layers=1), num_steps=20)
    fields = plain_sgd(schedule="linear", final_lr_ratio=0.1, warmup_steps=5)
    config.optim = OptimConfig(learning_rate=1.0, **fields)
    batches = [random_batch(config, seed=k) for k in range(20)]
    for step in bad_steps:
        batches[step - 1]["inputs"][:] = poison
    found, states = train_on(config, 20, batches=batches)
    for step in range(1, 21):
        moved = np.linalg.norm(change(states[step - 1], states[step]).astype(np.float64))
        if step in bad_steps:
            assert moved == 0 and not np.isfinite(found["loss"][step - 1])
            continue
        applied = moved / found["grad_norm"][step - 1]
        np.testing.assert_allclose(applied, found["learning_rate"][step - 1], rtol=1e-3)
    want = [step / 5 if step <= 5 else 1 - 0.9 * (step - 5) / 15 for step in range(1, 21)]
    np.testing.assert_allclose(found["learning_rate"], want, rtol=1e-5)
    assert found["skipped"][-1] == 5


def test_float16_trains_like_float32():
    losses, states = train(tiny_config(compute={"dtype": "float16"}), same_batch=True)
    exact, _ = train(tiny_config(), same_batch=True)
    np.testing.assert_allclose(losses, exact, atol=0.02)
    assert states[-1].loss_scale["scale"] == loss_scale.FIRST
    assert states[-1].loss_scale["good_steps"] == 6
    assert losses[-1] < losses[0] - 0.5


def test_float16_skips_an_overflow_and_halves_the_scale(monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**40)
    _, states = train(tiny_config(compute={"dtype": "float16"}), steps=1)
    before, after = states
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, after.opt_state)
    assert after.loss_scale["scale"] == 2.0**39 and after.step == 1
    assert after.bad == {"in_a_row": 0, "skipped": 0}, "not the step's fault"


def test_the_scale_doubles_after_many_finite_steps():
    state = {"scale": jnp.float32(8), "good_steps": jnp.int32(loss_scale.GROW_EVERY - 1)}
    grown = loss_scale.adjust(state, jnp.bool(True))
    assert (grown["scale"], grown["good_steps"]) == (16, 0)


@pytest.mark.parametrize("name", ["muon", "lion", "adafactor", "sgd"])
def test_every_optimizer_learns_and_is_the_same_on_a_mesh(name):
    rate = {"muon": 1e-2, "lion": 2e-3, "adafactor": 1e-2, "sgd": 0.3}[name]

    def run(shape):
        wide = {"embed_dim": 128} if name == "adafactor" else {}  # it factors from 128 on
        config = tiny_config(shape, **wide)
        config.optim.name, config.optim.learning_rate = name, rate
        return train(config, same_batch=True)

    one, states = run((1, 1, 1))
    assert one[-1] < one[0] - 0.1
    mesh, mesh_states = run((2, 2, 2))
    # Lion takes signs: rounding noise in a gradient near 0 moves a weight by twice the rate
    np.testing.assert_allclose(mesh, one, atol=5e-3 if name == "lion" else 1e-4)


@pytest.mark.parametrize(
    "variant",
    [
        dict(
            num_kv_heads=2,
            position="rope",
            norm="rmsnorm",
            activation="swiglu",
            bias=False,
            qk_norm=True,
            tie_embeddings=False,
        ),
        dict(window=5, full_attention_every=2, position="rope", logit_softcap=10.0),
        dict(norm_position="post", position="sinusoidal", activation="relu2"),
    ],
    ids=["modern", "windows", "post-norm"],
)
def test_every_architecture_is_the_same_on_a_mesh(variant):
    one, _ = train(tiny_config(**variant))
    mesh, _ = train(tiny_config((2, 2, 2), **variant))
    np.testing.assert_allclose(mesh, one, atol=1e-4)


def changes(width: int, mup: bool) -> tuple[float, float]:
    """RMS change of (residual stream, logits) after four AdamW steps at a fixed learning rate."""
    config = tiny_config(embed_dim=width, mup_base_width=16 if mup else 0)
    config.optim.warmup_steps, config.optim.schedule = 0, "constant"
    _, states = train(config, steps=4)
    with jax.set_mesh(mesh := mesh_of(config)):
        spec = make_training(config, mesh).spec.for_decoding()
        tokens = jnp.asarray(random_batch(config, 9)["inputs"][0])
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        @jax.jit
        def coordinates(params):  # before the final norm, which would hide the growth
            model = spec.bind(params)
            x = model.stack.embed(model.vocabulary.embed(tokens), positions)
            stream, _ = model.stack.run(x, AttentionMask(positions, positions), None, None)
            return stream, model(tokens)[..., :203]

        first, last = (coordinates(states[i].params) for i in (0, -1))
    return tuple(
        float(np.sqrt(np.mean((np.asarray(b) - np.asarray(a)) ** 2)))
        for a, b in zip(first, last, strict=True)
    )


@pytest.mark.slow
def test_mup_coordinate_check():
    """What a step changes does not grow with width under muP (arXiv:2203.03466, appendix D.1),
    so that a learning rate tuned at the base width carries over; without, it does."""
    base, wide = changes(16, True), changes(256, True)
    for small, large in zip(base, wide, strict=True):
        assert 0.5 < large / small < 2
    stream, logits = (b / a for a, b in zip(changes(16, False), changes(256, False), strict=True))
    assert stream > 20 and logits > 4
