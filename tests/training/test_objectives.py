"""The seam between a step and what it minimises, by an objective that exists here only."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import train
from jaxgpt.config.schema import IGNORE
from jaxgpt.objectives.language import token_losses
from jaxgpt.training.objectives import OBJECTIVES
from jaxgpt.training.setup import make_training
from jaxgpt.training.step import make_train_step
from tests.conftest import mesh_of, random_batch, tiny_config

CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=3, batch_size=16, grad_accum=2, log_every=1,
        model=ModelConfig(max_seq_len=16, num_layers=1, num_heads=2, embed_dim=16),
        data=DataConfig(source="text:{corpus}/*.txt"), optim=OptimConfig(warmup_steps=1),
        sample=SampleConfig(max_new_tokens=2),
    )
"""


def towards(teacher_weight: float):
    """Makes an objective: squared distance to a teacher's losses, of the counted targets, three
    numbers counted for each."""

    def objective(model, micro, key, teacher):
        ours, theirs = (token_losses(m, micro, None)[0] for m in (model, teacher))
        counted = jnp.sum(micro["targets"] != IGNORE)
        distance = jnp.sum(jnp.square(ours - teacher_weight * jax.lax.stop_gradient(theirs)))
        return distance, 3 * counted, {"loss": distance, "teacher_nats": jnp.sum(theirs)}

    return lambda config: objective


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_an_objective_with_a_companion_and_a_metric_of_its_own(monkeypatch, shape):
    """Against the same sums by plain autodiff over all rows at once, and optax's update."""
    monkeypatch.setitem(OBJECTIVES, "towards", towards(0.5))
    config = tiny_config(shape, num_layers=1)
    config.objective, config.grad_accum = "towards", 2
    config.optim.name, config.optim.clip_norm, config.optim.weight_decay = "sgd", 0.0, 0.0
    config.optim.schedule, config.optim.warmup_steps, config.optim.b1 = "constant", 0, 0.0
    batch = random_batch(config)
    batch["targets"][:, :, ::3] = IGNORE
    with jax.set_mesh(mesh := mesh_of(config)):
        run = make_training(config, mesh)
        state, teacher = run.first_state(), jax.jit(run.spec.init)(jax.random.key(5))
        before = jax.device_get(state.params)
        step = make_train_step(run.spec, config, {"teacher": run.spec})
        device = jax.device_put(batch, run.batch_sharding)
        after, metrics = step(state, device, {"teacher": teacher})
        after, metrics, kept = jax.device_get((after.params, metrics, teacher))

    alone = tiny_config((1, 1, 1), num_layers=1)
    with jax.set_mesh(mesh := mesh_of(alone)):
        spec = make_training(alone, mesh).spec
        micro = {name: jnp.asarray(a.reshape(-1, a.shape[-1])) for name, a in batch.items()}
        count = 3 * int((batch["targets"] != IGNORE).sum())

        def mean(params, teacher):
            models = spec.bind(params), spec.bind(teacher)
            total, _, sums = towards(0.5)(config)(models[0], micro, None, models[1])
            return total / count, sums["teacher_nats"] / count

        (loss, nats), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(before, kept)
        sgd = optax.sgd(config.optim.learning_rate)
        updates, _ = sgd.update(grads, sgd.init(before))
        want = jax.device_get(optax.apply_updates(before, updates))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["teacher_nats"], nats, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after, want)


def test_an_objectives_metrics_reach_the_rows(command, corpus, tmp_path, monkeypatch):
    def with_share(config):
        plain = causal_lm(config)

        def objective(model, micro, key):
            total, count, metrics = plain(model, micro, key)
            return total, count, metrics | {"e_share": jnp.sum(micro["targets"] == ord("e"))}

        return objective

    causal_lm = OBJECTIVES["causal_lm"]
    monkeypatch.setitem(OBJECTIVES, "causal_lm", with_share)
    (tmp_path / "c.py").write_text(CONFIG.format(corpus=corpus))
    code, _, err = command(train.main, f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    shares = [row["e_share"] for row in rows if row["split"] == "train"]
    assert len(shares) == 3 and all(0.01 < share < 0.3 for share in shares), shares
    assert all(round(share * 16 * 16, 3) == int(share * 16 * 16 + 0.5) for share in shares)
