"""Every sparse pattern against dense attention under its mask, in float64; and what it costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import ModelConfig
from jaxgpt.ops import kernels
from jaxgpt.ops.context.sharded import sharded
from jaxgpt.ops.kernels import splash_attention
from jaxgpt.ops.mask import AttentionMask, Reach
from jaxgpt.ops.sparse.gathered import gathered_attention
from jaxgpt.ops.sparse.lsh import lsh_attention, sorted_by_hash, unit_length
from jaxgpt.ops.sparse.patterns import (
    Column,
    First,
    Lsh,
    Neighbours,
    Pattern,
    Random,
    Row,
    Window,
    keys_seen,
)
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parameters.flops import flops_per_token
from jaxgpt.system.errors import BadInput
from tests.conftest import mesh_of, tiny_config
from tests.ops.test_ops import normal

LENGTH = 77  # a multiple of no block


def pairs(name: str, causal: bool) -> np.ndarray:
    """The mask as the papers draw it: which of LENGTH keys each of LENGTH queries sees."""
    q, k = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    if name == "window":
        seen = abs(q - k) < 20
    if name == "dilated":
        seen = (abs(q - k) < 5 * 3) & ((q - k) % 3 == 0)
    if name == "longformer":
        seen = (abs(q - k) < 20) | (k < 3) | (q < 3)
    if name == "strided":
        seen = (abs(q - k) < 9) | ((q - k) % 9 == 0)
    if name == "axial":
        seen = (q // 11 == k // 11) | (q % 11 == k % 11)
    if name == "bigbird":
        seen = (abs(q // 8 - k // 8) < 2) | (k < 3) | (q < 3)
        for row in range(-(-LENGTH // 8)):
            for share in range(2):
                drawn = int(random_blocks(causal).drawn(np.int32(row), share))
                if drawn >= 0:
                    seen |= (q // 8 == row) & (k // 8 == drawn)
    return seen & (k <= q) if causal else seen


def random_blocks(causal):
    return Random(8, 2, 10, causal)


def pattern(name: str, causal: bool) -> Pattern:
    first = 0 if causal else 3
    return {
        "window": Pattern((Window(20),)),
        "dilated": Pattern((Window(5, 3),)),
        "longformer": Pattern((Window(20), First(3)), first),
        "strided": Pattern((Window(9), Column(9))),
        "axial": Pattern((Row(11), Column(11))),
        "bigbird": Pattern((Neighbours(8), First(3), random_blocks(causal)), first),
    }[name]


NAMES = ["window", "dilated", "longformer", "strided", "axial", "bigbird"]
ROWS = np.tile(np.arange(LENGTH), (2, 1))
SEGMENTS = np.stack([ROWS[0] // 30, (ROWS[0] > 50) * 5])


def dense64(q, k, v, seen, penalty=0.0):
    """Attention [B T N H] over the keys seen [B T S] or [B N T S], and its weights."""
    k, v = (np.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    scores = 0.3 * np.einsum("BTNH,BSNH->BNTS", q, k) - penalty
    scores = np.where(seen if seen.ndim == 4 else seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("BNTS,BSNH->BTNH", weights, v), weights


def dense64_gradients(q, k, v, seen, target, penalty=0.0):
    """The gradients of sum(attention * target), by hand."""
    groups, heads = q.shape[2] // k.shape[2], k.shape[2]
    _, weights = dense64(q, k, v, seen, penalty)
    many_k, many_v = (np.repeat(a, groups, axis=2) for a in (k, v))
    of_v = np.einsum("BNTS,BTNH->BSNH", weights, target)
    of_weights = np.einsum("BTNH,BSNH->BNTS", target, many_v)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * 0.3
    of_q = np.einsum("BNTS,BSNH->BTNH", of_scores, many_k)
    of_k = np.einsum("BNTS,BTNH->BSNH", of_scores, q)
    shape = (*k.shape[:2], heads, groups, k.shape[3])
    return of_q, of_k.reshape(shape).sum(3), of_v.reshape(shape).sum(3)


def assert_equal(attend, arrays, seen, mask, penalty=0.0):
    """Value and gradient of `attend` are those of dense attention, to 1e-5."""
    target = normal(*arrays[0].shape, seed=9)
    args = [jnp.asarray(a, jnp.float32) for a in arrays]
    mask = jax.tree.map(jnp.asarray, mask)

    @jax.jit
    def both(*args):
        out, back = jax.vjp(lambda *a: attend(*a, mask, scale=0.3), *args)
        return out, back(jnp.asarray(target, jnp.float32))

    found, gradients = both(*args)
    np.testing.assert_allclose(found, dense64(*arrays, seen, penalty)[0], atol=1e-5)
    wanted = dense64_gradients(*arrays, seen, target, penalty)
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_patterns_against_dense_attention_in_float64(name, causal):
    """Grouped heads; the second time over segments, which cut what a pattern shows."""
    seen = np.stack([pairs(name, causal)] * 2)
    mask = AttentionMask(ROWS, ROWS, reach=Reach(causal, pattern=pattern(name, causal)))
    np.testing.assert_array_equal(jax.tree.map(jnp.asarray, mask).visible(), seen)
    arrays = [normal(2, LENGTH, heads, 5, seed=s) for s, heads in enumerate((4, 2, 2))]
    assert_equal(gathered_attention, arrays, seen, mask)
    same = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    cut = mask._replace(q_segments=SEGMENTS, kv_segments=SEGMENTS)
    assert_equal(gathered_attention, arrays, seen & same, cut)


@pytest.mark.parametrize("name", ["window", "dilated", "strided"])
def test_positions_may_start_anew_with_each_document(name):
    """What looks the same from everywhere: packed rows, whose positions are a document's own."""
    starts = np.array([[0, 17, 40], [0, 1, 63]])
    segments = np.array([np.searchsorted(s, ROWS[0], "right") for s in starts])
    own = ROWS - np.take_along_axis(starts, segments - 1, axis=1)
    reach = Reach(pattern=pattern(name, True))
    mask = AttentionMask(own, own, segments, segments, reach=reach)
    seen = pairs(name, True) & (segments[:, :, None] == segments[:, None, :])
    assert_equal(
        gathered_attention, [normal(2, LENGTH, 2, 5, seed=s) for s in range(3)], seen, mask
    )


PARTS = st.one_of(
    st.builds(Window, st.integers(1, 40), st.integers(1, 5)),
    st.builds(Row, st.integers(1, 30)),
    st.builds(Column, st.integers(1, 30)),
    st.builds(Neighbours, st.integers(1, 30)),
    st.builds(Random, st.integers(1, 9), st.integers(1, 4), st.just(30), st.booleans()),
)


@given(part=PARTS, length=st.integers(1, 130), causal=st.booleans())
@settings(max_examples=150, deadline=None)
def test_blocks_hold_every_key_that_a_part_covers(part, length, causal):
    causal = getattr(part, "causal", causal)
    phases, block, keys = part.layout(length, causal)
    size = -(-length // (phases * block)) * phases * block
    in_order = np.arange(size).reshape(-1, phases).T.reshape(-1, block)  # positions of each block
    q, k = np.arange(length)[:, None], np.arange(length)[None]
    missing = part.covers(q, k) & (k <= q if causal else True)
    for row, queries in enumerate(in_order):
        for name in keys:
            at = row + name if isinstance(name, int) else name[row]
            if 0 <= at < len(in_order):
                missing[np.ix_(queries[queries < length], in_order[at][in_order[at] < length])] = 0
    assert not missing.any()


@given(rows=st.integers(2, 200), count=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_random_blocks_are_others_and_spread(rows, count):
    """In front of a block's neighbours, each from its own share, so no block twice."""
    row = np.arange(rows, dtype=np.int32)
    drawn = np.stack([Random(8, count, rows, True).drawn(row, share) for share in range(count)])
    assert np.all(drawn < np.maximum(row - 1, 0))
    for column in drawn.T:
        some = column[column >= 0]
        assert len(set(some)) == len(some)
    assert np.all((drawn >= 0).sum(0) == np.clip(row - 1, 0, count))


def test_random_blocks_are_drawn_about_equally_often():
    drawn = Random(8, 1, 100, False).drawn(np.arange(20_000, dtype=np.int32), 0)
    counts = np.bincount(drawn, minlength=100)
    assert len(counts) == 100 and 0.6 * 200 < counts.min() and counts.max() < 1.4 * 200
    steps = np.bincount(np.diff(drawn) % 100, minlength=100)
    assert steps.max() < 1.5 * 200, "from one row to the next, any step is as likely"


def hashed_pairs(q, segments, pattern, causal):
    """The mask [B N T S] that hashing makes: some round has both in one chunk or neighbours."""
    length, padding = q.shape[1], -q.shape[1] % pattern.chunk
    q = np.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    behind = np.pad(segments, ((0, 0), (0, padding)), constant_values=10**6)
    _, ranks = sorted_by_hash(jnp.asarray(q, jnp.float32), jnp.asarray(behind), pattern)
    chunks = np.asarray(ranks)[..., :length] // pattern.chunk
    apart = chunks[..., :, None] - chunks[..., None, :]
    seen = ((apart >= 0) & (apart <= 1)).any(axis=1)
    seen &= (segments[:, :, None] == segments[:, None, :])[:, None]
    return seen & np.tril(np.ones((length, length), bool)) if causal else seen


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_lsh_against_dense_attention_under_the_mask_of_its_hashes(causal, rounds):
    """The softmax over the union of what the rounds find, own keys only where there is no other."""
    chosen, segments = Lsh(8, rounds), SEGMENTS
    q, k, v = (normal(2, LENGTH, 3, 6, seed=s) for s in range(3))
    seen = hashed_pairs(q, segments, chosen, causal)
    mask = AttentionMask(ROWS, ROWS, segments, segments, reach=Reach(causal, pattern=chosen))
    assert 0.05 < seen.mean() < 0.6, "else this tests nothing"
    assert_equal(lsh_attention, [q, k, v], seen, mask, penalty=1e5 * np.eye(LENGTH))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_lsh_in_one_chunk_is_full_attention_with_shared_queries(causal):
    chosen = Lsh(LENGTH, 2)
    q, v = (normal(2, LENGTH, 2, 6, seed=s) for s in range(2))
    k = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(unit_length(jnp.asarray(q, jnp.float32)), k, atol=1e-5)
    seen = np.tril(np.ones((LENGTH, LENGTH), bool)) if causal else np.ones((LENGTH, LENGTH), bool)
    mask = AttentionMask(ROWS, ROWS, reach=Reach(causal, pattern=chosen))
    assert_equal(lsh_attention, [q, k, v], np.stack([seen] * 2), mask, penalty=1e5 * np.eye(LENGTH))


def recall_of_nearest(rounds: int, length: int = 512, chunk: int = 32, nearest: int = 8) -> float:
    """The share of each query's most similar keys that hashing has it read: vectors in groups of
    16 around common centres, as trained queries are, in random order."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(length // 16, 32)).repeat(16, axis=0)
    q = rng.permutation(centres + 0.4 * rng.normal(size=centres.shape))[None, :, None]
    unit = q[0, :, 0] / np.linalg.norm(q[0, :, 0], axis=-1, keepdims=True)
    similar = unit @ unit.T - 9 * np.eye(length)
    best = np.argsort(-similar, axis=-1)[:, :nearest]
    seen = hashed_pairs(q, np.zeros((1, length), int), Lsh(chunk, rounds), False)[0, 0]
    return np.take_along_axis(seen, best, axis=-1).mean()


def test_lsh_finds_most_of_the_nearest_keys():
    """By chance a round finds 2 * chunk / length = 12.5% of them; more rounds find more."""
    one, four = recall_of_nearest(1), recall_of_nearest(4)
    assert one > 0.35 and four > 0.8, (one, four)


SPARSE = {
    "window": Pattern((Window(64),)),
    "longformer": Pattern((Window(64), First(1)), 1),
    "bigbird": Pattern((Neighbours(32), First(1), Random(32, 2, 128, True))),
}


@pytest.mark.parametrize("name", SPARSE)
def test_work_and_memory_grow_with_the_length_not_with_its_square(name):
    def cost(length):
        q = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        at = jax.ShapeDtypeStruct((1, length), jnp.int32)
        mask = AttentionMask(at, at, reach=Reach(pattern=SPARSE[name]))
        run = jax.jit(lambda *a: gathered_attention(*a, scale=1.0))
        done = run.lower(q, q, q, mask).compile()
        return done.cost_analysis()["flops"], done.memory_analysis().temp_size_in_bytes

    (flops, memory), (more_flops, more_memory) = cost(1024), cost(4096)
    assert more_flops < 4.5 * flops and more_memory < 4.5 * memory
    assert more_flops < 0.5 * 2 * 2 * 16 * 4096**2, "of full attention's"


def test_splash_runs_what_it_can_skip(monkeypatch):
    """In the interpreter: value and gradient against the reference, causal and not, in segments."""
    monkeypatch.setattr(kernels, "BLOCK", 128)
    for name, causal in (("longformer", False), ("bigbird", True)):
        reach = Reach(causal, pattern=pattern(name, causal))
        mask = AttentionMask(ROWS, ROWS, SEGMENTS, SEGMENTS, reach=reach)
        seen = pairs(name, causal) & (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])
        arrays = [normal(2, LENGTH, heads, 8, seed=s) for s, heads in enumerate((2, 1, 1))]
        attend = functools.partial(splash_attention, interpret=True)
        assert_equal(attend, arrays, seen, mask)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_splash_skips_the_blocks_that_nobody_sees(causal):
    """Of 32 x 32 blocks those run that hold a pair which is seen: 2 (3) a row, and a column (and a
    row) of global tokens."""
    chosen = Pattern((Window(257), First(1)), 0 if causal else 1)
    info = kernels.splash_kernel((8192, 8192), 1, Reach(causal, pattern=chosen)).fwd_mask_info
    run = int((np.asarray(info.block_mask) > 0).sum())
    assert run == (32 + 31 + 30 if causal else 32 + 31 * 2 + 30 * 2)
    assert info.block_mask.shape[-1] == (3 if causal else 32), "of a row; the grid shrinks to it"


def test_prefixes_are_refused():
    q = jnp.zeros((2, LENGTH, 1, 8))
    for attend, chosen in ((gathered_attention, SPARSE["window"]), (lsh_attention, Lsh(8, 1))):
        prefix = jnp.array([3, 0])
        mask = AttentionMask(ROWS, ROWS, prefix=prefix, reach=Reach(pattern=chosen))
        with pytest.raises(BadInput, match="prefix"):
            attend(q, q, q, mask, scale=1.0)


@pytest.mark.parametrize("name", ["bigbird", "lsh"])
def test_sharded_equals_unsharded(name):
    """Over sequences and heads, value and gradient: hashing too is each head's own."""
    chosen = Lsh(8, 2) if name == "lsh" else pattern(name, True)
    attend = lsh_attention if name == "lsh" else gathered_attention
    rows = np.tile(np.arange(LENGTH), (8, 1))
    mask = jax.tree.map(jnp.asarray, AttentionMask(rows, rows, reach=Reach(pattern=chosen)))
    arrays = [jnp.asarray(normal(8, LENGTH, 2, 8, seed=s), jnp.float32) for s in range(3)]

    def outcome(run, arrays):
        loss = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(run(*a) ** 2), argnums=(0, 1, 2)))
        return loss(*arrays)

    whole = outcome(lambda *a: attend(*a, mask, scale=0.3), arrays)
    rules = AxisRules()
    with jax.set_mesh(mesh_of(tiny_config((2, 2, 2)))):
        spread = jax.device_put(arrays, rules("batch", None, "heads", None))
        at = jax.tree.map(lambda a: jax.device_put(a, rules("batch", None)), mask)
        split = sharded(attend, rules, scale=0.3)
        found = outcome(lambda *a: split(*a, at), spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, whole)


def test_how_many_keys_are_seen():
    for name in NAMES:
        for causal in (True, False):
            seen = keys_seen(pattern(name, causal), LENGTH, causal)
            assert abs(seen - pairs(name, causal).sum() / LENGTH) < 1e-4


def test_model_flops_count_the_pairs_that_are_seen():
    """A window of 8 in 64 positions: 1 to 7 keys, then 8; 484 / 64 = 7.6 on average."""
    full = ModelConfig(vocab_size=128, max_seq_len=64, num_layers=3).with_sizes()
    fields = dict(attention_pattern="longformer", sparse_block=8, global_tokens=0)
    fewer = flops_per_token(full) - flops_per_token(dataclasses.replace(full, **fields))
    assert fewer == 12 * 3 * 12 * 64 * (64 - 8)
    shared = dataclasses.replace(full, attention_pattern="lsh", sparse_block=16, hash_rounds=2)
    assert flops_per_token(full) - flops_per_token(shared) == 3 * 6 * 768 * 768
