"""Packing keeps documents whole and apart; mixtures are exact over any prefix."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import prepare as prepare_command
from jaxgpt.config import Config, DataConfig, ModelConfig
from jaxgpt.config.schema import IGNORE
from jaxgpt.data.chunks import PackedChunks
from jaxgpt.data.mixture import MixtureSchedule
from jaxgpt.data.packing import make_plan, plan_for
from jaxgpt.data.pipeline import training_stream
from jaxgpt.data.prepare import prepare
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from tests.conftest import config_flag, mesh_of, tiny_config
from tests.data.damage import DAMAGE

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def stream_of(sizes):
    """Documents of these sizes: end-of-text 0, then ids that tell token from token."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    tokens = np.arange(1, sum(sizes) + 1)
    tokens[starts] = 0
    return tokens, starts


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 16))
def test_every_token_is_a_target_once_and_in_its_own_document(sizes, length):
    tokens, starts = stream_of(sizes)
    packed = PackedChunks(tokens, length, make_plan(starts, len(tokens), length), 0)
    batch = packed.read(np.arange(len(packed)))
    real = batch["targets"] != IGNORE
    assert packed.num_targets(np.arange(len(packed))) == real.sum() == len(tokens)
    np.testing.assert_array_equal(np.sort(batch["inputs"][real]), np.sort(tokens))
    np.testing.assert_array_equal(real, batch["segments"] > 0)
    for row in range(len(packed)):
        for segment in range(1, batch["segments"][row].max() + 1):
            mine = batch["segments"][row] == segment
            inputs, targets = batch["inputs"][row][mine], batch["targets"][row][mine]
            np.testing.assert_array_equal(batch["positions"][row][mine], np.arange(mine.sum()))
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            assert np.count_nonzero(inputs == 0) <= 1, "one document"
    whole = [size for size in sizes if size <= length]
    cuts = sum(len(packed.segments(w)) for w in range(len(packed)))
    assert cuts == len(whole) + sum(-(-size // length) for size in sizes if size > length)


def test_the_plan_by_hand():
    plan = make_plan(np.array([0, 4, 13]), 15, 6)
    packed = PackedChunks(*(stream_of([4, 9, 2])[0], 6, plan, 0))
    spans = [packed.segments(w) for w in range(len(packed))]
    assert spans == [[(4, 6)], [(0, 4), (13, 2)], [(10, 3)]]


def test_best_fit_leaves_little_room():
    sizes = np.random.default_rng(0).geometric(1 / 300, 5000)
    starts = stream_of(sizes)[1]
    plan = make_plan(starts, int(sizes.sum()), 1024)
    assert sizes.sum() / (1024 * (len(plan.first) - 1)) > 0.995


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_documents_in_a_window_do_not_see_each_other(position):
    """Changing one document changes no logit of its neighbours, bit for bit."""
    config = tiny_config(position=position, num_kv_heads=2)
    tokens, starts = stream_of([7, 9, 5, 30])
    packed = PackedChunks(tokens, 24, make_plan(starts, len(tokens), 24), 0)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        params = spec.init(jax.random.key(0))

        @jax.jit
        def logits(inputs, segments, positions):
            return spec.bind(params)(inputs, segments=segments, positions=positions)

        def run(batch, inputs):
            return np.asarray(logits(inputs, batch["segments"], batch["positions"]))[..., :203]

        batch = packed.read(np.arange(1, 3))
        before = run(batch, batch["inputs"])
        assert batch["segments"].max() >= 2
        for segment in range(1, batch["segments"].max() + 1):
            mine = batch["segments"] == segment
            after = run(batch, np.where(mine, 200 - batch["inputs"], batch["inputs"]))
            np.testing.assert_array_equal(after[~mine], before[~mine])
            assert np.abs(after[mine] - before[mine]).max() > 1e-3
        alone = packed.segments(1)[1]
        ids = jnp.asarray(tokens[alone[0] : alone[0] + alone[1]])[None]
        row = batch["segments"][0] == 2
        by_itself = np.asarray(jax.jit(lambda ids: spec.bind(params)(ids))(ids))[..., :203]
        np.testing.assert_allclose(before[0][row], by_itself[0], atol=1e-5)


WEIGHTS = st.lists(st.integers(1, 30), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(WEIGHTS)
def test_turns_are_exact_over_every_prefix(weights):
    weights = [Fraction(w, sum(weights)) for w in weights]
    turns = MixtureSchedule(tuple(weights))
    source, turn = turns.at(np.arange(3 * turns.period))
    for i, weight in enumerate(weights):
        count = np.cumsum(source == i)
        np.testing.assert_array_equal(turn[source == i], np.arange(count[-1]))
        off = [abs(int(c) - n * weight) for n, c in enumerate(count, start=1)]
        assert max(off) < 1


def test_weights_without_a_short_period_are_refused():
    with pytest.raises(BadInput, match="write them with fewer digits"):
        MixtureSchedule((Fraction(1, 1000003), Fraction(1000002, 1000003)))


def config_of(corpus, **data):
    return Config(
        model=ModelConfig(max_seq_len=64).with_sizes(),
        batch_size=4,
        grad_accum=2,
        data=DataConfig(source=f"1*text:{corpus}/0.txt,3*text:{corpus}/[123].txt", **data),
    )


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_mixture_of_packed_or_plain_windows(corpus, pack, hosts):
    config = config_of(corpus, pack=pack)
    data = prepare(config.data)
    stream = training_stream(data.train, config)
    shares = [0, 0]
    for k in range(30):
        batch = stream.batch(k)
        assert stream.num_targets(k) == (batch["targets"] != IGNORE).sum()
        parts = [stream.batch(k, np.arange(2).reshape(hosts, -1)[h]) for h in range(hosts)]
        for name, whole in batch.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts], 1), whole)
        source, _ = stream.chunks(stream.indices(k).ravel())
        shares = [share + np.count_nonzero(source == i) for i, share in enumerate(shares)]
        assert abs(shares[0] - (k + 1)) < 1, "a quarter of four"
    again = training_stream(prepare(config.data).train, config)
    np.testing.assert_array_equal(again.batch(7)["inputs"], stream.batch(7)["inputs"])


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["first", "starts", "lengths", "meta.json", ".verified.json"])
def test_a_damaged_plan_is_made_anew(corpus, capsys, name, damage):
    config = config_of(corpus, pack=True)
    data = prepare(config.data)
    before = training_stream(data.train, config).batch(0)
    folder = data.folder / "pack-64/train.1"
    (folder / ".verified.json").unlink()
    plan_for(data.train, 1, 64, data.folder.parent / "locks")
    capsys.readouterr()
    DAMAGE[damage](folder / name)
    after = training_stream(data.train, config).batch(0)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 or name == ".verified.json", told
    assert "made anew" in told or name == ".verified.json"
    np.testing.assert_array_equal(before["inputs"], after["inputs"])
    training_stream(data.train, config)
    assert not capsys.readouterr().err, "it is whole now"


def test_corpus_shorter_than_a_window(corpus):
    config = config_of(corpus)
    data = prepare(config.data)
    one = data.train.parts[0]
    config.model.max_seq_len = one.end - one.first - 1
    training_stream(data.train, config)
    config.model.max_seq_len += 1
    with pytest.raises(BadInput, match="0.txt has .* tokens, shorter than one chunk"):
        training_stream(data.train, config)
    config.data.pack = True
    training_stream(data.train, config)


@pytest.mark.parametrize("pack", [False, True])
def test_show(command, corpus, tmp_path, pack):
    data = f"source='text:{corpus}/*.txt', validation_fraction=0.2, pack={pack}"
    model = "batch_size=2, model=ModelConfig(max_seq_len=3000)"
    flag = config_flag(tmp_path, f"{model}, data=DataConfig({data})")
    code, out, _ = command(prepare_command.main, flag, "--show=1")
    assert code == 0 and out.startswith("batch 1 (step 2): 2 chunks of 3000 tokens")
    text = (corpus / "1.txt").read_text()
    assert f"{corpus}/1.txt (from its token " in out and text[500:900] in out
    assert "--- loss on 0-" in out
    assert ("segment 1, positions 0-" in out) == pack
    code, _, err = command(prepare_command.main, flag, "--show=-1")
    assert code == 2 and "batches count from 0" in err


def test_packed_training_is_the_same_on_any_mesh(corpus):
    from jaxgpt.data.pipeline import device_batches
    from jaxgpt.training.setup import make_training

    losses = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        config = tiny_config(shape, vocab_size=257, window=16, num_kv_heads=2)
        config = dataclasses.replace(
            config, data=DataConfig(source=f"text:{corpus}/*.txt", pack=True), grad_accum=2
        )
        stream = training_stream(prepare(config.data).train, config)
        with jax.set_mesh(mesh := mesh_of(config)):
            training = make_training(config, mesh)
            state, step = jax.jit(training.init)(), training.compile_step()
            found = []
            for batch in device_batches(stream, training.batch_sharding, 0, 10):
                state, metrics = step(state, batch)
                found.append(float(metrics["loss"]))
        losses.append(found)
    np.testing.assert_allclose(*losses, atol=1e-4)
    assert losses[0][-1] < losses[0][0]
