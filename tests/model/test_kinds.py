"""Encoders and encoder-decoders: what must hold of them beyond a decoder's stack."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt.config import Config, MeshConfig
from jaxgpt.config.validate import validate
from jaxgpt.model import ModelSpec, decoding
from jaxgpt.model.cross_attention import CrossAttention, memory_mask
from jaxgpt.model.encoder_decoder import positions_in
from jaxgpt.model.relative import RelativeBias, buckets_by_distance
from jaxgpt.objectives.language import causal_lm
from jaxgpt.ops.cache import Cache, empty_cache, write_recent
from jaxgpt.optim.groups import decay_mask, is_hidden_matrix
from jaxgpt.optim.optimizers import make_optimizer
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parameters.flops import flops_per_token
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path
from tests.conftest import mesh_of, tiny_config

BERT = dict(
    kind="encoder",
    norm_position="post",
    type_vocab_size=2,
    embedding_norm=True,
    head_transform=True,
    head_bias=True,
)
T5 = dict(
    kind="encoder_decoder",
    encoder_layers=1,
    max_source_len=20,
    norm="rmsnorm",
    position="relative",
    relative_buckets=8,
    relative_max_distance=20,
    activation="geglu",
    bias=False,
    tie_embeddings=False,
    scale_attention=False,
)
BART = dict(kind="encoder_decoder", max_source_len=20, norm_position="post", embedding_norm=True)
KINDS = {"encoder": BERT, "encoder_decoder": T5}


def batch_of(config: Config, rows: int = 8) -> dict[str, np.ndarray]:
    """One microbatch of random tokens, the ends of half of the rows padding."""
    rng, cfg = np.random.default_rng(1), config.model

    def ids(length: int):
        return rng.integers(0, cfg.vocab_size, (rows, length)).astype(np.int32)

    def padded(length: int):
        lengths = np.where(np.arange(rows) % 2, length, rng.integers(5, length, rows))
        return (np.arange(length) < lengths[:, None]).astype(np.int32)

    batch = {"inputs": ids(cfg.max_seq_len), "segments": padded(cfg.max_seq_len)}
    batch["targets"] = np.where(batch["segments"] == 0, -1, ids(cfg.max_seq_len)).astype(np.int32)
    if cfg.kind == "encoder_decoder":
        length = cfg.max_source_len
        return batch | {"sources": ids(length), "source_segments": padded(length)}
    return batch | {"types": (ids(cfg.max_seq_len) % 2).astype(np.int32)}


@functools.cache
def built(**model):
    config = tiny_config(**model)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        params = jax.device_get(jax.jit(spec.init)(jax.random.key(0)))
        # biases and norms that are not 0 and 1, as they are only at the start
        rng, scale = np.random.default_rng(2), 0.1
        params = jax.tree.map(lambda a: jnp.asarray(a + scale * rng.normal(size=a.shape)), params)
    return config, spec, params


def losses(spec: ModelSpec, params: dict, micro: dict, key=None, **optim) -> jax.Array:
    config = dataclasses.replace(spec.config)
    config.optim = dataclasses.replace(config.optim, **optim)
    micro = jax.tree.map(jnp.asarray, micro)
    total, count, _ = causal_lm(config)(spec.bind(params), micro, key)
    return total / count


def whole_logits(spec: ModelSpec, params: dict, micro: dict) -> jax.Array:
    places = {n: jnp.asarray(a) for n, a in micro.items() if n not in ("inputs", "targets")}
    return spec.bind(params)(jnp.asarray(micro["inputs"]), **places)


@functools.cache
def loss_and_gradients(kind: str, shape: tuple, compute: tuple = (), dropout: float = 0.0):
    model = KINDS[kind] | ({"dropout": dropout} if dropout else {})
    config, _, params = built(**model)
    config = tiny_config(shape, dict(compute), **model)
    with jax.set_mesh(mesh := mesh_of(config)):
        spec = ModelSpec(config, "xla")
        shapes = jax.eval_shape(spec.init, jax.random.key(0))

        def put(a, spec):
            return jax.device_put(np.asarray(a), jax.sharding.NamedSharding(mesh, spec))

        params = jax.tree.map(lambda a, s: put(a, s.sharding.spec), params, shapes)
        micro = {n: put(a, spec.rules("batch", "seq")) for n, a in batch_of(config).items()}
        key = jax.random.key(3) if dropout else None
        run = jax.jit(jax.value_and_grad(lambda p: losses(spec, p, micro, key, z_loss=0.01)))
        return jax.device_get(run(params))


def assert_close(got, want, **tolerance):
    for path, leaf in leaves_by_path(want).items():
        np.testing.assert_allclose(leaves_by_path(got)[path], leaf, err_msg=path, **tolerance)


SHAPES = [(1, 8, 1), (2, 2, 2)]
REST = [pytest.param(shape, marks=pytest.mark.slow) for shape in [(8, 1, 1), (1, 1, 4)]]


@pytest.mark.parametrize("shape", [*SHAPES, *REST], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_unsharded(kind, shape):
    """The loss, and the gradient of every parameter."""
    want, got = (loss_and_gradients(kind, s) for s in ((1, 1, 1), shape))
    assert_close(got[0], want[0], atol=1e-5)
    assert_close(got[1], want[1], atol=1e-5, rtol=1e-4)
    unused = [p for p, a in leaves_by_path(want[1]).items() if not np.any(a)]
    # Nothing can move a bias of keys, which is the same for all of a query's scores
    assert all(path.endswith("attention/key/bias") for path in unused), unused


def test_a_scan_of_layers_equals_each_its_own_program():
    compute = (("scan_layers", "false"), ("remat", "full"))
    want = loss_and_gradients("encoder_decoder", (1, 1, 1), dropout=0.1)
    got = loss_and_gradients("encoder_decoder", (1, 1, 1), compute, dropout=0.1)
    assert_close(got[1], want[1], atol=1e-6)
    assert abs(want[0] - loss_and_gradients("encoder_decoder", (1, 1, 1))[0]) > 1e-3


def test_an_encoders_tokens_see_all_but_padding():
    config, spec, params = built(**BERT)
    micro = batch_of(config, 2)
    micro["segments"][0, 15:] = 0
    with jax.set_mesh(mesh_of(config)):
        run = jax.jit(lambda ids, **places: spec.bind(params)(ids, **places))
        run = functools.partial(run, **{n: micro[n] for n in ("segments", "types")})
        first = run(micro["inputs"])
        padding, last = (micro["inputs"].copy() for _ in range(2))
        padding[0, 15:] = 7
        last[0, 14] = (last[0, 14] + 1) % 203
        np.testing.assert_array_equal(run(padding)[0, :15], first[0, :15])
        moved = np.abs(np.asarray(run(last) - first)[0, :15, :203]).max(axis=-1)
    assert np.all(moved > 1e-4)  # from both sides


@pytest.mark.parametrize("model", [T5, BART], ids=["t5", "bart"])
def test_packed_pairs_equal_separate_ones(model):
    """Two pairs in a row, and padding, whose tokens change nothing."""
    config, spec, params = built(**model)
    rng = np.random.default_rng(5)
    pairs = [tuple(rng.integers(0, 203, (1, n)) for n in lengths) for lengths in ((7, 9), (8, 12))]

    def joined(part: int, length: int, filler: int):
        rest = length - sum(pair[part].shape[1] for pair in pairs)
        return np.concatenate([*(p[part] for p in pairs), np.full((1, rest), filler)], axis=1)

    def numbers(part: int, length: int, of):
        parts = [of(i, pair[part].shape[1]) for i, pair in enumerate(pairs)]
        return np.array([[*np.concatenate(parts), *[0] * length]])[:, :length]

    places = dict(
        segments=numbers(1, 24, lambda i, n: [i + 1] * n),
        positions=numbers(1, 24, lambda i, n: range(n)),
        source_segments=numbers(0, 20, lambda i, n: [i + 1] * n),
    )
    with jax.set_mesh(mesh_of(config)):
        spec = spec.for_decoding()
        call = jax.jit(lambda tokens, **more: spec.bind(params)(tokens, **more))
        whole, other = (call(joined(1, 24, f), sources=joined(0, 20, f), **places) for f in (0, 9))
        alone = [call(target, sources=source)[0, :, :203] for source, target in pairs]
    np.testing.assert_allclose(whole[0, :9, :203], alone[0], atol=1e-5)
    np.testing.assert_allclose(whole[0, 9:21, :203], alone[1], atol=1e-5)
    np.testing.assert_array_equal(whole[0, :21], other[0, :21])


def test_positions_count_within_segments():
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [3, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(positions_in(segments), [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]])


@pytest.mark.parametrize("model", [T5, BART], ids=["t5", "bart"])
def test_cached_decoding_equals_the_whole(model):
    """The sources read once; a start of 5 tokens, then one at a time; half the sources padded."""
    config, spec, params = built(**model)
    micro = batch_of(config, 3)
    tokens = jnp.asarray(micro["inputs"])
    sources = {n: jnp.asarray(micro[n]) for n in ("sources", "source_segments")}
    positions = jnp.broadcast_to(jnp.arange(24), (3, 24))
    with jax.set_mesh(mesh_of(config)):
        spec = spec.for_decoding()
        whole = jax.jit(lambda p: spec.bind(p)(tokens, **sources))(params)
        split = jax.jit(lambda p: decoding.split_layers(p, spec.model))(params)

        @jax.jit
        def start(params):
            model, layers = spec.bind(params), decoding.blocks_of(params)
            memory = decoding.read_sources(model, layers, *sources.values())
            first = tokens[:, :5], positions[:, :5]
            x, read = decoding.prefill(model, layers, *first, memory)
            cache = empty_cache(spec.config, 3, 24, spec.rules)
            cache = write_recent(cache, Cache(read, first[1]), spec.rules)
            table = model.vocabulary.table()
            return memory, cache, decoding.next_logits(model, x[:, -1], table)

        @jax.jit
        def step(params, memory, cache, t):
            model, layers = spec.bind(params), decoding.blocks_of(params)
            recent = empty_cache(spec.config, 3, 1, spec.rules)
            token = tokens[:, t], positions[:, t], cache, recent, jnp.int32(0)
            x, recent = decoding.extend(model, layers, *token, memory)
            logits = decoding.next_logits(model, x, model.vocabulary.table())
            return write_recent(cache, recent, spec.rules), logits

        memory, cache, logits = start(split)
        found = [logits]
        for t in range(5, 24):
            cache, logits = step(split, memory, cache, t)
            found.append(logits)
    np.testing.assert_allclose(np.stack(found, axis=1), whole[:, 4:], atol=2e-5)


def test_cross_attention_against_float64():
    config, spec, params = built(**BART)
    p = jax.tree.map(lambda a: a[0], params["decoder"]["blocks"]["cross_attention"])
    rng = np.random.default_rng(6)
    x, memory = rng.normal(size=(2, 5, 32)), rng.normal(size=(2, 7, 32))
    segments = np.array([[1] * 7, [1, 1, 1, 0, 0, 0, 0]], np.int32)
    with jax.set_mesh(mesh_of(config)):
        rules = AxisRules()
        module = CrossAttention(config, rules, "xla", rngs=nnx.Rngs(params=0))
        graph, state = nnx.split(module)
        nnx.replace_by_pure_dict(state, p)
        mask = memory_mask(5, jnp.asarray(segments), None, rules)
        arrays = jnp.asarray(x, jnp.float32), jnp.asarray(memory, jnp.float32)
        got = jax.jit(lambda state, *a: nnx.merge(graph, state)(*a))(state, *arrays, mask)

    def project(name, a):
        kernel, bias = (np.asarray(p[name][n], np.float64) for n in ("kernel", "bias"))
        return np.einsum("bld,dnh->bnlh", a, kernel) + bias[:, None]

    q, k, v = project("query", x), project("key", memory), project("value", memory)
    scores = np.einsum("bnth,bnsh->bnts", q, k) / np.sqrt(8)
    scores = np.where(segments[:, None, None] == 0, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    read = np.einsum("bnts,bnsh->btnh", weights, v)
    want = np.einsum("btnh,nhd->btd", read, np.float64(p["out"]["kernel"])) + p["out"]["bias"]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_relative_buckets_are_t5s():
    """Numbers of transformers' `T5Attention._relative_position_bucket`, 32 buckets up to 128."""
    at = np.array([-200, -128, -91, -90, -46, -45, -16, -15, -8, -7, -1, 0, 1, 7, 8, 12, 91, 128])
    index = np.clip(at, -128, 128) + 128
    causal, both = (buckets_by_distance(c, 32, 128)[index].tolist() for c in (True, False))
    assert causal == [31, 31, 29, 29, 24, 23, 16, 15, 8, 7, 1] + [0] * 7
    assert both == [15, 15, 15, 14, 13, 12, 10, 9, 8, 7, 1, 0, 17, 23, 24, 25, 31, 31]


@pytest.mark.parametrize("causal", [True, False])
def test_a_relative_bias_is_that_of_the_keys_distance(causal):
    """Row t, column s has the table's row of s - t, at any positions."""
    config = tiny_config(position="relative", relative_buckets=8, relative_max_distance=20)
    queries, keys = np.array([[3, 50], [0, 7]]), np.array([[1, 3, 90], [8, 2, 1]])
    with jax.set_mesh(mesh_of(config)):
        bias = RelativeBias(config, AxisRules(), causal=causal, rngs=nnx.Rngs(params=0))
        got = bias(jnp.asarray(queries), jnp.asarray(keys))
        table = np.asarray(bias.kernel[...])
    distances = np.clip(keys[:, None] - queries[:, :, None], -20, 20)
    buckets = buckets_by_distance(causal, 8, 20)
    np.testing.assert_array_equal(got, table[buckets[distances + 20]].transpose(0, 3, 1, 2))


@pytest.mark.parity
def test_relative_buckets_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    for buckets, furthest in ((32, 128), (8, 20), (64, 256), (6, 9), (32, 127)):
        for causal in (True, False):
            want = T5Attention._relative_position_bucket(
                torch.arange(-furthest, furthest + 1), not causal, buckets, furthest
            )
            np.testing.assert_array_equal(buckets_by_distance(causal, buckets, furthest), want)


@pytest.mark.parametrize("kind", KINDS)
def test_label_smoothing(kind):
    """Against whole logits in float64, the vocabulary's padding left out: value and gradient of the
    output embedding; the rows' `loss` stays the plain one."""
    config, spec, params = built(**KINDS[kind])
    micro, share = batch_of(config, 2), 0.3
    with jax.set_mesh(mesh_of(config)):
        logits = jax.jit(functools.partial(whole_logits, spec))(params, micro)
        run = jax.jit(jax.value_and_grad(lambda p: losses(spec, p, micro, label_smoothing=share)))
        got, grads = run(params)
        smoothed = dataclasses.replace(config.optim, label_smoothing=share)
        objective = causal_lm(dataclasses.replace(config, optim=smoothed))
        rows = jax.tree.map(jnp.asarray, micro)
        plain = jax.jit(lambda p: objective(spec.bind(p), rows, None)[2]["loss"])(params)
    logits = np.asarray(logits, np.float64)[..., :203]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted, onehot = micro["targets"] >= 0, np.eye(203)[micro["targets"]]
    wanted = np.where(counted[..., None], (1 - share) * onehot + share / 203, 0)
    np.testing.assert_allclose(got, -(wanted * logprobs).sum() / counted.sum(), rtol=1e-6)
    np.testing.assert_allclose(plain, -(onehot * logprobs)[counted].sum(), rtol=1e-6)
    if kind == "encoder":
        bias = (counted[..., None] * np.exp(logprobs) - wanted).sum((0, 1)) / counted.sum()
        np.testing.assert_allclose(grads["head_bias"][:203], bias, atol=1e-6)
        assert not np.any(grads["head_bias"][203:])


@pytest.mark.parity
def test_label_smoothing_is_torchs():
    torch = pytest.importorskip("torch")
    config, spec, params = built(**T5)
    micro = batch_of(config, 2)
    with jax.set_mesh(mesh_of(config)):
        logits = jax.jit(functools.partial(whole_logits, spec))(params, micro)
        got = jax.jit(lambda p: losses(spec, p, micro, label_smoothing=0.1))(params)
    rows = torch.tensor(np.array(logits)[..., :203]).reshape(-1, 203)
    targets = torch.tensor(micro["targets"]).long().reshape(-1)
    want = torch.nn.functional.cross_entropy(rows, targets, ignore_index=-1, label_smoothing=0.1)
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)


def test_every_field_of_two_stacks_is_read():
    """Perturbing it changes the program of the loss (see tests/model/test_gpt.py)."""

    def program(**fields):
        config = tiny_config(**T5 | fields)
        with jax.set_mesh(mesh_of(config)):
            spec = ModelSpec(config, "xla")
            params = jax.eval_shape(spec.init, jax.random.key(0))
            found = jax.jit(functools.partial(losses, spec)).trace(params, batch_of(config, 1))
            return f"{found.jaxpr} {[np.asarray(c).tolist() for c in found.jaxpr.consts]}"

    plain = program()
    assert program() == plain
    changes = dict(encoder_layers=2, max_source_len=18, relative_buckets=12)
    for name, value in (changes | {"relative_max_distance": 30}).items():
        assert program(**{name: value}) != plain, name


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_program(kind):
    """Three times XLA's count of the forward pass, which counts what is not a product too."""
    sizes = dict(embed_dim=64, max_seq_len=64, vocab_size=384, num_heads=2)
    model = KINDS[kind] | sizes | ({"max_source_len": 96} if kind != "encoder" else {})
    config = tiny_config(compute={"scan_layers": "false"}, **model)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        params = jax.eval_shape(spec.init, jax.random.key(0))
        call = jax.jit(functools.partial(whole_logits, spec))
        lowered = call.lower(params, batch_of(config, 2))
        counted = lowered.compile().cost_analysis()["flops"]
    assert 0.97 < 3 * counted / (2 * 64 * flops_per_token(config.model)) < 1.15


@pytest.mark.parametrize("name", ["adafactor", "muon", "adamw"])
def test_every_optimizer_takes_two_stacks(name):
    """Of different depths; tables of relative positions, biases and norms do not decay."""
    config, spec, params = built(**T5 | {"head_bias": True})
    optim = dataclasses.replace(config.optim, name=name)
    optimizer = make_optimizer(optim, 10, config.model)
    with jax.set_mesh(mesh_of(config)):

        @jax.jit
        def update(params):
            grads = jax.tree.map(lambda a: 0.01 * a + 0.1, params)
            return optimizer.update(grads, optimizer.init(params), params)[0]

        updates = update(jax.device_put(params))
    assert all(np.all(np.isfinite(a)) and np.any(a) for a in jax.tree.leaves(updates))
    kept = {p for p, decays in leaves_by_path(decay_mask(params)).items() if not decays}
    assert {p.split("/")[-1] for p in kept} == {"scale", "kernel", "head_bias"}
    tables = {p for p in kept if p.endswith("kernel")}
    assert tables == {"encoder/relative/kernel", "decoder/relative/kernel"}
    hidden = {p for p in leaves_by_path(params) if is_hidden_matrix(p)}
    assert "decoder/blocks/cross_attention/query/kernel" in hidden and len(hidden) == 4 * 3 + 3 * 2


@pytest.mark.parametrize(
    "model, message",
    [
        (dict(encoder_layers=2), "model.encoder_layers=2 needs model.kind=encoder_decoder"),
        (dict(max_source_len=9), "model.max_source_len=9 needs model.kind=encoder_decoder"),
        (BERT, "objective=causal_lm needs model.kind=decoder, not encoder"),
        (T5 | dict(type_vocab_size=2), "an encoder_decoder has no token types"),
        (BERT | dict(activation="swiglu"), "model.head_transform with model.activation=swiglu"),
        (dict(position="relative", relative_buckets=7), "must be even"),
        (dict(position="relative", relative_max_distance=16), "above 16"),
    ],
)
def test_what_does_not_go_together(model, message):
    config = dataclasses.replace(tiny_config(**model), mesh=MeshConfig())
    with pytest.raises(BadInput, match=message):
        validate(config)


def test_relative_positions_and_smoothing_name_what_they_exclude():
    config = tiny_config(compute={"attention": "splash"}, position="relative")
    with pytest.raises(BadInput, match="model.position=relative with compute.attention='splash'"):
        validate(config)
    config = tiny_config(logit_softcap=5.0)
    config.optim.label_smoothing = 0.1
    with pytest.raises(BadInput, match="optim.label_smoothing=0.1 with model.logit_softcap=5.0"):
        validate(config)
