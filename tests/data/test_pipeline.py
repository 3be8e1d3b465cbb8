"""Batch k is a pure function of (seed, k), on any number of hosts."""

from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from jaxgpt.config.schema import IGNORE
from jaxgpt.data.chunks import ContiguousChunks
from jaxgpt.data.mixture import MixtureSchedule
from jaxgpt.data.pipeline import Stream, _local_rows, device_batches
from jaxgpt.evaluation.windows import evaluation_batch, evaluation_windows
from jaxgpt.parallel.mesh import rules_of
from tests.conftest import mesh_of, tiny_config

TOKENS = np.arange(1000, dtype=np.uint16)


def windows(tokens=TOKENS, seq_len=10, batch=8, accum=1, seed=0, shuffle=True):
    sources = (ContiguousChunks(tokens, seq_len),)
    return Stream(sources, MixtureSchedule((Fraction(1),)), batch, accum, seed, shuffle)


def test_a_window_holds_consecutive_tokens_and_targets_are_next():
    batch = windows(accum=2).batch(3)
    assert batch["inputs"].shape == (2, 4, 10) and batch["inputs"].dtype == np.int32
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
    assert np.all(batch["inputs"][..., 0] % 10 == 0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31), st.integers(0, 5))
def test_each_epoch_is_a_permutation(count, seed, epoch):
    w = windows(tokens=np.zeros(count * 10 + 1, np.uint16), seed=seed)
    places = range(epoch * count, (epoch + 1) * count)
    assert sorted(w.chunks(np.array(places))[1]) == list(range(count))


def test_order_depends_on_seed_and_epoch_and_can_be_switched_off():
    def order(epoch=0, **kw):
        return windows(**kw).chunks(99 * epoch + np.arange(99))[1].tolist()

    orders = [order(), order(seed=1), order(epoch=1), order(shuffle=False)]
    assert len(set(map(tuple, orders))) == 4
    assert orders[-1] == list(range(99))


def test_the_order_is_pinned():
    """A library update that changes the order would break every resume: notice it here."""
    assert windows().chunks(np.arange(8))[1].tolist() == [87, 61, 50, 7, 70, 72, 24, 52]


def test_grad_accum_splits_the_same_batch():
    one, four = windows().batch(5), windows(accum=4).batch(5)
    np.testing.assert_array_equal(one["inputs"].reshape(8, 10), four["inputs"].reshape(8, 10))


def test_loader_starts_anywhere_and_ends():
    config = tiny_config()
    with jax.set_mesh(mesh := mesh_of(config)):
        sharding = NamedSharding(mesh, rules_of(mesh)(None, "batch", "seq"))
        every = list(device_batches(windows(), sharding, 0, 7))
        late = list(device_batches(windows(), sharding, 5, 7))
    assert (len(every), len(late)) == (7, 2)
    for k in (5, 6):
        np.testing.assert_array_equal(every[k]["inputs"], windows().batch(k)["inputs"])
        np.testing.assert_array_equal(late[k - 5]["targets"], windows().batch(k)["targets"])


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 4)])
def test_batches_on_a_mesh_equal_the_host_batch(shape):
    with jax.set_mesh(mesh := mesh_of(tiny_config(shape))):
        sharding = NamedSharding(mesh, rules_of(mesh)(None, "batch", "seq"))
        (batch,) = device_batches(windows(), sharding, 2, 3)
        assert batch["inputs"].sharding == sharding
        assert list(_local_rows(sharding, (1, 8, 10))) == list(range(8))
    np.testing.assert_array_equal(batch["inputs"], windows().batch(2)["inputs"])


def test_hosts_rows_make_up_the_global_batch():
    whole = windows(accum=2).batch(4)["inputs"]
    parts = [windows(accum=2).batch(4, np.arange(h * 2, h * 2 + 2))["inputs"] for h in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 200), st.integers(1, 20), st.integers(1, 5))
def test_evaluation_counts_every_target_once(length, seq_len, batch):
    tokens = np.arange(length, dtype=np.uint16)
    batches = -(-evaluation_windows(len(tokens), seq_len, seq_len) // batch)
    pairs = [evaluation_batch(tokens, seq_len, batch, k) for k in range(batches)]
    inputs = np.concatenate([p["inputs"].ravel() for p in pairs])
    targets = np.concatenate([p["targets"].ravel() for p in pairs])
    counted = targets != IGNORE
    np.testing.assert_array_equal(targets[counted], tokens[1:])
    np.testing.assert_array_equal(inputs[counted], tokens[:-1])
    assert np.all(targets[len(tokens) - 1 :] == IGNORE)
