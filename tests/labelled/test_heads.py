"""Heads and their losses against numpy in float64 and PyTorch, on one device and on many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config.schema import IGNORE
from jaxgpt.labelled.heads import class_losses, pooled, span_losses
from jaxgpt.optim.groups import OWN
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.training.setup import make_training
from jaxgpt.training.step import make_train_step
from tests.conftest import mesh_of, tiny_config

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 5)) * 3
LABELS = np.array([0, 4, IGNORE, 2, 2, 1])
WEIGHTS = np.array([0.5, 1.0, 2.0, 1.5, 0.25])


def softmax_costs(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=-1, keepdims=True)) - shifted


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_and_smoothed_cross_entropy(smoothing):
    loss, nats, hits = class_losses(
        jnp.asarray(LOGITS), jnp.asarray(LABELS), jnp.asarray(WEIGHTS), smoothing
    )
    costs = softmax_costs(LOGITS)
    for i, label in enumerate(LABELS):
        if label == IGNORE:
            assert loss[i] == nats[i] == hits[i] == 0
            continue
        own = WEIGHTS[label] * costs[i, label]
        wanted = (1 - smoothing) * own + smoothing * np.mean(WEIGHTS * costs[i])
        np.testing.assert_allclose(loss[i], wanted, rtol=1e-5)
        np.testing.assert_allclose(nats[i], costs[i, label], rtol=1e-5)
        assert hits[i] == (LOGITS[i].argmax() == label)


@pytest.mark.parity
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_pytorch(smoothing):
    torch = pytest.importorskip("torch")
    logits = torch.tensor(LOGITS, requires_grad=True)
    wanted = torch.nn.functional.cross_entropy(
        logits,
        torch.tensor(LABELS),
        torch.tensor(WEIGHTS),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=smoothing,
    )
    wanted.backward()

    def total(logits):
        return jnp.sum(
            class_losses(logits, jnp.asarray(LABELS), jnp.asarray(WEIGHTS), smoothing)[0]
        )

    value, grad = jax.value_and_grad(total)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-5)
    np.testing.assert_allclose(grad, logits.grad, atol=1e-5)


def test_pooling_takes_the_first_the_last_or_all_of_the_text():
    x, lengths = RNG.normal(size=(3, 4, 2)), [4, 1, 3]
    segments = np.array([[1] * n + [0] * (4 - n) for n in lengths])
    with jax.set_mesh(mesh_of(tiny_config())):
        for name, wanted in (
            ("first", x[:, 0]),
            ("last", np.stack([row[n - 1] for row, n in zip(x, lengths)])),
            ("mean", np.stack([row[:n].mean(axis=0) for row, n in zip(x, lengths)])),
        ):
            got = pooled(jnp.asarray(x), jnp.asarray(segments), name, AxisRules())
            np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_the_loss_of_a_span_is_the_mean_of_its_ends():
    logits = RNG.normal(size=(3, 7, 2))
    spans = np.array([[1, 3], [0, 0], [IGNORE, IGNORE]])
    logits[0, 1, 0] = logits[0, 3, 1] = 9
    nats, hits = span_losses(jnp.asarray(logits), jnp.asarray(spans))
    costs = softmax_costs(np.moveaxis(logits, -1, -2))
    wanted = [(costs[i, 0, s] + costs[i, 1, e]) / 2 for i, (s, e) in enumerate(spans[:2])]
    np.testing.assert_allclose(nats, [*wanted, 0], rtol=1e-5, atol=1e-6)  # a float32's sum
    assert hits[0] == 1 and hits[2] == 0


def batch_for(objective, config):
    """Random rows of every length, [2, 4, ...]."""
    rng = np.random.default_rng(1)
    shape = (config.grad_accum, config.batch_size // config.grad_accum, config.model.max_seq_len)
    lengths = rng.integers(4, shape[2] + 1, shape[:2])[..., None]
    text = np.arange(shape[2]) < lengths
    batch = {
        "inputs": np.where(text, rng.integers(0, 200, shape), 0),
        "segments": text.astype(np.int32),
        "positions": np.where(text, np.arange(shape[2]), 0),
    }
    classes = rng.integers(0, 3, shape)
    first, last = np.sort(rng.integers(0, lengths, (*shape[:2], 2)), axis=-1).transpose(2, 0, 1)
    more = {
        "classification": {"labels": classes[..., 0]},
        "token_classification": {"targets": np.where(text & (classes > 0), classes, IGNORE)},
        "span_qa": {"spans": np.stack([first, last], axis=-1), "context": text},
    }
    return {n: a.astype(np.int32) for n, a in (batch | more[objective]).items()}


OBJECTIVES = [pytest.param(n, marks=pytest.mark.slow) for n in ("token_classification", "span_qa")]


@pytest.mark.parametrize("objective", ["classification", *OBJECTIVES])
def test_a_step_on_many_devices_is_that_on_one(objective):
    """With dropout, whose masks do not depend on the mesh, weights, and two microbatches."""
    results = {}
    for shape in ((1, 1, 1), (2, 2, 2)):
        config = tiny_config(shape, num_layers=1)
        config.objective, config.grad_accum = objective, 2
        config.optim.name, config.optim.clip_norm, config.optim.warmup_steps = "sgd", 0.0, 0
        cfg = getattr(config.objectives, objective)
        if objective != "span_qa":
            cfg.labels, cfg.class_weights = "a,b,c", "1,2,0.5"
        batch = batch_for(objective, config)
        with jax.set_mesh(mesh := mesh_of(config)):
            run = make_training(config, mesh)
            state = run.first_state()
            before = np.array(state.params[OWN]["classifier"]["kernel"])
            abstract = run.abstract_batch()
            assert abstract.keys() >= batch.keys()
            device = {n: jax.device_put(a, abstract[n].sharding) for n, a in batch.items()}
            state, metrics = make_train_step(run.spec, config)(state, device)
            results[shape] = jax.device_get((state.params, metrics))
    (params, metrics), (sharded, sharded_metrics) = results.values()
    assert 0 <= metrics["accuracy"] <= 1 and metrics["loss"] > 0
    # Of gradients times a learning rate of 1e-2: their sums have another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, sharded)
    np.testing.assert_allclose(metrics["loss"], sharded_metrics["loss"], rtol=1e-5)
    after = params[OWN]["classifier"]["kernel"]
    assert after.shape == (32, 2 if objective == "span_qa" else 3)
    assert np.abs(after - before).max() > 1e-4  # the head is trained
