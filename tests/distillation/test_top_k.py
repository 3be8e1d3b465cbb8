"""A teacher's likeliest tokens: against float64 NumPy, on meshes, on disk, in every batch."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import DataConfig, DistillConfig, ObjectivesConfig
from jaxgpt.config.schema import IGNORE
from jaxgpt.data.chunks import ContiguousChunks
from jaxgpt.data.mixture import MixtureSchedule
from jaxgpt.data.pipeline import Stream, device_batches
from jaxgpt.data.prepare import prepare
from jaxgpt.distillation import teacher as teacher_module
from jaxgpt.distillation.divergence import Output
from jaxgpt.distillation.records import Records
from jaxgpt.distillation.top_k import most_likely, top_k_losses
from jaxgpt.ops import cross_entropy as module
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path
from jaxgpt.training.setup import make_training
from tests.conftest import mesh_of, tiny_config
from tests.distillation.test_divergence import (
    DIRECTIONS,
    KNOWN,
    RULES,
    WEIGHTS,
    arrays,
    logsumexp64,
    scaled,
    softcapped,
)
from tests.ops.test_ops import normal

K, HEAT = 3, 2.0
MESHES = pytest.mark.parametrize(
    ("shape", "parts"), [((1, 1, 1), 3), ((1, 1, 4), 2), ((2, 2, 2), 3)]
)


def likeliest64(x, table, k=K):
    """The likeliest ids and their log-probabilities."""
    logits = 0.4 * (x @ table.T)[..., :KNOWN] / HEAT
    logs = logits - logsumexp64(logits)[..., None]
    ids = np.argsort(-logs, axis=-1)[..., :k]
    return ids, np.take_along_axis(logs, ids, -1)


def losses64(x, table, targets, ids, logs, direction):
    ours = 5 * np.tanh(0.7 * (x @ table.T)[..., :KNOWN] / 5)
    lse = logsumexp64(ours)
    picked = np.take_along_axis(ours, np.maximum(targets, 0)[..., None], -1)[..., 0]
    q = np.exp(ours / HEAT - logsumexp64(ours / HEAT)[..., None])
    q, p = np.take_along_axis(q, ids, -1), np.exp(logs)
    q, p = (np.concatenate([a, 1 - a.sum(-1, keepdims=True)], -1) for a in (q, p))
    one, other = (p, q) if direction == "forward" else (q, p)
    soft = HEAT**2 * np.sum(one * np.log(one / other), -1)
    return [np.where(targets != IGNORE, a, 0) for a in (lse - picked, lse, soft)]


@DIRECTIONS
@MESHES
def test_losses_and_gradients_against_float64(shape, parts, direction, monkeypatch):
    monkeypatch.setattr(module, "parts_for", lambda *a: parts)
    x, table, their_x, their_table, targets = arrays()
    ids, logs = likeliest64(their_x, their_table)
    cfg = DistillConfig(temperature=HEAT, divergence=direction, top_k=K)

    def total(x, table, targets, ids, logs):
        micro = {"targets": targets, "teacher_ids": ids, "teacher_logs": logs}
        found = top_k_losses(Output(x, table, softcapped), micro, cfg, RULES)
        nats, lse, soft = found
        return jnp.sum(WEIGHTS[0] * nats + WEIGHTS[1] * lse**2 + WEIGHTS[2] * soft), found

    def total64(x, table):
        nats, lse, soft = losses64(x, table, targets, ids, logs, direction)
        return np.sum(WEIGHTS[0] * nats + WEIGHTS[1] * lse**2 + WEIGHTS[2] * soft)

    with jax.set_mesh(mesh_of(tiny_config(shape))):
        hidden, rows = RULES("batch", "seq", None), RULES("batch", "seq")
        specs = hidden, RULES("vocab", "embed"), rows, hidden, hidden
        given = jnp.float32(x), jnp.float32(table), targets, ids.astype(np.int32), jnp.float32(logs)
        placed = [jax.device_put(a, spec) for a, spec in zip(given, specs, strict=True)]
        grads, found = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(*placed)
    for got, want in zip(found, losses64(x, table, targets, ids, logs, direction), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
    for i, got in enumerate(grads):
        along, h = normal(*got.shape, seed=7 + i), 1e-6
        ends = [
            total64(*(a + s * h * along if j == i else a for j, a in enumerate((x, table))))
            for s in (1, -1)
        ]
        want = (ends[0] - ends[1]) / (2 * h)
        np.testing.assert_allclose(np.sum(np.asarray(got) * along), want, rtol=1e-4)
    assert np.all(np.asarray(grads[0])[targets == IGNORE] == 0)


@MESHES
def test_the_likeliest_tokens(shape, parts, monkeypatch):
    """More are asked for than a part, or a device, has."""
    monkeypatch.setattr(module, "parts_for", lambda *a: parts)
    *_, x, table, _ = arrays()
    with jax.set_mesh(mesh_of(tiny_config(shape))):
        placed = (
            jax.device_put(jnp.float32(x), RULES("batch", "seq", None)),
            jax.device_put(jnp.float32(table), RULES("vocab", "embed")),
        )
        run = jax.jit(lambda x, table: most_likely(Output(x, table, scaled), 7, HEAT, RULES))
        ids, logs = run(*placed)
    want_ids, want = likeliest64(x, table, 7)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(logs, want, rtol=1e-5)


def test_records_are_whole_or_missing(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "0.records"
    records = Records.open(path, 5, 4, K, 70_000)
    assert records.missing(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    ids, logs = rng.integers(0, 70_000, (2, 4, K)), rng.normal(size=(2, 4, K)).astype(np.float32)
    records.write(np.array([4, 1]), ids, logs)
    records = Records.open(path, 5, 4, K, 70_000)  # as the next run does
    assert records.missing(np.arange(5)).tolist() == [0, 2, 3]
    found = records.read(np.array([1, 4, 1]))
    np.testing.assert_array_equal(found["ids"], ids[[1, 0, 1]])
    np.testing.assert_array_equal(found["logs"], logs[[1, 0, 1]])
    size = records.dtype.itemsize
    whole = path.read_bytes()
    path.write_bytes(
        whole[: 4 * size + 9] + bytes([whole[4 * size + 9] ^ 1]) + whole[4 * size + 10 :]
    )
    assert records.missing(np.arange(5)).tolist() == [0, 2, 3, 4]
    with pytest.raises(BadInput, match="the record of chunk 4 is damaged or missing"):
        records.read(np.array([1, 4]))
    swapped = whole[:size] + whole[4 * size :] + whole[2 * size :]
    path.write_bytes(swapped)  # chunk 4's record where chunk 1's belongs
    assert 1 in records.missing(np.arange(2)).tolist()


def test_a_chunk_brings_its_own_in_any_batch(tmp_path, monkeypatch, capsys):
    """And what is on disk is not computed again."""
    config = tiny_config((2, 2, 2), vocab_size=257)
    config.objective, config.num_steps, config.grad_accum = "distill", 3, 2
    config.objectives = ObjectivesConfig(distill=DistillConfig(teacher="a", top_k=K))
    (tmp_path / "a.txt").write_text("All work and no play makes Jack a dull boy. " * 40)
    data = prepare(DataConfig(source=f"text:{tmp_path}/a.txt"))
    theirs = dataclasses.replace(tiny_config(vocab_size=257, num_layers=1), mesh=config.mesh)
    monkeypatch.setattr(teacher_module, "teacher_config", lambda config: theirs)
    tokens = np.asarray(data.train.tokens)
    chunks = ContiguousChunks(tokens, 24)
    stream = Stream((chunks,), MixtureSchedule((Fraction(1),)), 8, 2, 0, True)
    with jax.set_mesh(mesh := mesh_of(config)):
        run = make_training(config, mesh)
        params = jax.jit(run.companions.spec.init)(jax.random.key(3))
        weights = jax.device_get(leaves_by_path(jax.tree.map(lambda a: 4 * a, params)))
        monkeypatch.setattr(teacher_module, "load_weights", lambda path, rounded: (weights, None))
        taught = run.companions.taught(stream, data)
        assert "0 of" in capsys.readouterr().err
        batches = list(device_batches(taught, run.batch_sharding, 0, 3))
        assert set(batches[0]) == set(run.abstract_batch())
        spec, params = run.companions.spec, run.companions.params()
        forward = jax.jit(lambda params, tokens: spec.bind(params)(tokens))
        for batch in batches:
            logits = np.asarray(forward(params, batch["inputs"][1]), np.float64)[..., :257] / HEAT
            logs = logits - logsumexp64(logits)[..., None]
            found = jax.device_get(batch)
            want = np.take_along_axis(logs, found["teacher_ids"][1], -1)
            np.testing.assert_allclose(found["teacher_logs"][1], want, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found["teacher_logs"][1], -np.sort(-logs)[..., :K], 1e-4)
        monkeypatch.setattr(type(run.companions), "_make", None)  # nothing is left to make
        again = make_training(config, mesh).companions.taught(stream, data)
        assert f"{len(chunks)} of {len(chunks)} chunks" in capsys.readouterr().err
        np.testing.assert_array_equal(again.batch(1)["teacher_ids"], taught.batch(1)["teacher_ids"])
