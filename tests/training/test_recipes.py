"""What some recipes add to a step: averages, loss scaling, muP, every optimizer on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import Config
from jaxgpt.training import loss_scale
from jaxgpt.training.setup import make_training
from tests.conftest import mesh_of, random_batch, tiny_config


def train(config: Config, steps: int = 6, same_batch: bool = False):
    """(losses, states as NumPy) of a few steps."""
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        state, step, losses = jax.jit(training.init)(), training.compile_step(), []
        states = [jax.tree.map(np.array, state)]
        for k in range(steps):
            host = random_batch(config, seed=0 if same_batch else k)
            batch = {n: jax.device_put(a, training.batch_sharding) for n, a in host.items()}
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            states.append(jax.tree.map(np.array, state))
    return np.array(losses), states


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
    jax.tree.map(np.testing.assert_array_equal, plain[-1].params, states[-1].params)


def test_float16_trains_like_float32():
    losses, states = train(tiny_config(dtype="float16"), same_batch=True)
    exact, _ = train(tiny_config(), same_batch=True)
    np.testing.assert_allclose(losses, exact, atol=0.02)
    assert states[-1].loss_scale["scale"] == loss_scale.FIRST
    assert states[-1].loss_scale["good_steps"] == 6
    assert losses[-1] < losses[0] - 0.5


def test_float16_skips_an_overflow_and_halves_the_scale(monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**40)
    _, states = train(tiny_config(dtype="float16"), steps=1)
    before, after = states
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, after.opt_state)
    assert after.loss_scale["scale"] == 2.0**39 and after.step == 1


def test_the_scale_doubles_after_many_finite_steps():
    state = {"scale": jnp.float32(8), "good_steps": jnp.int32(loss_scale.GROW_EVERY - 1)}
    grown = loss_scale.adjust(state, jnp.bool(True))
    assert (grown["scale"], grown["good_steps"]) == (16, 0)


@pytest.mark.parametrize("name", ["muon", "lion", "adafactor", "sgd"])
def test_every_optimizer_learns_and_is_the_same_on_a_mesh(name):
    rate = {"muon": 1e-2, "lion": 2e-3, "adafactor": 1e-2, "sgd": 0.3}[name]

    def run(shape):
        config = tiny_config(shape)
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
    config = tiny_config(embed_dim=width, mup_base_width=32 if mup else 0)
    config.optim.warmup_steps, config.optim.schedule = 0, "constant"
    _, states = train(config, steps=4)
    with jax.set_mesh(mesh := mesh_of(config)):
        spec = make_training(config, mesh).spec.for_decoding()
        tokens = jnp.asarray(random_batch(config, 9)["inputs"][0])
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        @jax.jit
        def coordinates(params):  # before the final norm, which would hide the growth
            model = spec.bind(params)
            stream = model._run(tokens, positions, None, None)
            return stream, model(tokens)[..., :203]

        first, last = (coordinates(states[i].params) for i in (0, -1))
    return tuple(
        float(np.sqrt(np.mean((np.asarray(b) - np.asarray(a)) ** 2)))
        for a, b in zip(first, last, strict=True)
    )


def test_mup_coordinate_check():
    """What a step changes does not grow with width under muP (arXiv:2203.03466, appendix D.1),
    so that a learning rate tuned at the base width carries over; without, it does."""
    base, wide = changes(32, True), changes(512, True)
    for small, large in zip(base, wide, strict=True):
        assert 0.5 < large / small < 2
    stream, logits = (b / a for a, b in zip(changes(32, False), changes(512, False), strict=True))
    assert stream > 20 and logits > 4
