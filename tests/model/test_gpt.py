"""What must hold of the model itself."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import Config, ModelConfig
from jaxgpt.config.schema import fields_of, get_field, set_field
from jaxgpt.model import ModelSpec, decoding
from jaxgpt.model.spec import resolve_scan
from jaxgpt.objectives.language import token_losses
from jaxgpt.ops.cache import Cache, empty_cache, write_recent
from jaxgpt.ops.sparse.patterns import patterns_of
from jaxgpt.parameters.flops import count_parameters
from jaxgpt.training.setup import make_training
from jaxgpt.training.step import make_train_step
from tests.conftest import mesh_of, random_batch, tiny_config


def build(config: Config):
    spec = ModelSpec(config, "xla")
    return spec, jax.jit(spec.init)(jax.random.key(0))


def tokens_of(config: Config) -> jnp.ndarray:
    return jnp.asarray(random_batch(config)["inputs"][0])


def test_gpt2_has_its_published_size():
    config = Config(model=ModelConfig(vocab_size=50257).with_sizes())
    with jax.set_mesh(mesh_of(tiny_config())):
        abstract = jax.eval_shape(ModelSpec(config, "xla").init, jax.random.key(0))
    assert abstract["tokens"].shape == (50304, 768)
    assert count_parameters(abstract, config.model) == 124_439_808


def test_initialisation_is_gpt2s():
    """Matrices N(0, 0.02), the two residual projections smaller by sqrt(2L), the rest 0 and 1."""
    config = tiny_config(num_layers=8, embed_dim=64, vocab_size=1000, max_seq_len=200)
    with jax.set_mesh(mesh_of(config)):
        _, params = build(config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, values = path[-1].key, np.asarray(leaf)
        if name == "bias":
            assert np.all(values == 0)
        elif name == "scale":
            assert np.all(values == 1)
        else:
            residual = len(path) > 2 and path[-2].key in ("out", "down")
            want = 0.02 / np.sqrt(2 * 8) if residual else 0.02
            assert abs(values.std() / want - 1) < 0.03 and abs(values.mean()) < 0.05 * want, path
    first, second = params["blocks"]["mlp"]["up"]["kernel"][:2]
    assert not np.allclose(first, second), "each layer has its own draw"


def test_causality_by_gradient():
    """The logits at t depend on embeddings at s exactly where s <= t."""
    config = tiny_config(max_seq_len=6)
    with jax.set_mesh(mesh_of(config)):
        spec, params = build(config)
        tokens = 10 + jnp.arange(6)[None]  # all different: embedding row 10 + s is position s

        def logits_at(embedding, t):  # ids from 10 on, so that the first three are read as outputs
            logits = spec.for_decoding().bind(params | {"tokens": embedding})(tokens)[0, t, :3]
            return jnp.sum(jnp.square(logits))

        grads = [jax.grad(logits_at)(params["tokens"], t)[10:16] for t in range(6)]
        reached = np.abs(np.array(grads)).sum(-1) > 0
    np.testing.assert_array_equal(reached, np.tril(np.ones((6, 6), bool)))


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_packed_documents_do_not_see_one_another(position):
    """A row of two documents and padding gives each the logits that it has alone."""
    config = tiny_config(position=position, window=6)
    with jax.set_mesh(mesh_of(config)):
        spec, params = build(config)
        spec = spec.for_decoding()
        first, second = tokens_of(config)[:1, :9], tokens_of(config)[1:2, :12]
        packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
        segments = jnp.array([[1] * 9 + [2] * 12 + [0] * 3])
        positions = jnp.array([[*range(9), *range(12), *range(3)]])
        model = spec.bind(params)
        together = model(packed, positions=positions, segments=segments)
        np.testing.assert_allclose(together[:, :9], model(first), atol=1e-5)
        np.testing.assert_allclose(together[:, 9:21], model(second), atol=1e-5)


@pytest.mark.parametrize(
    "platform, layers, loops", [("cpu", 12, 0), ("cpu", 13, 1), ("tpu", 2, 1), ("gpu", 2, 1)]
)
def test_scan_layers_auto_goes_by_platform_and_depth(platform, layers, loops):
    config = tiny_config(num_layers=layers, compute={"scan_layers": "auto"})
    config = resolve_scan(config, platform)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        params = jax.eval_shape(spec.init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        text = jax.jit(lambda p, x: spec.bind(p)(x)).lower(params, tokens).as_text()
    assert text.count("stablehlo.while") == loops


@pytest.mark.parametrize(
    "variant",
    [
        {"scan_layers": "false"},
        {"remat": "dots"},
        {"remat": "full"},
        {"remat": "full", "scan_layers": "false"},
    ],
)
def test_scan_and_remat_change_neither_checkpoint_nor_numbers(variant):
    def loss_and_grads(**compute):
        config = tiny_config(compute=compute, dropout=0.1)
        with jax.set_mesh(mesh_of(config)):
            spec, params = build(config)
            tokens = tokens_of(config)

            def loss_of(params):
                micro = {"inputs": tokens, "targets": tokens}
                return jnp.mean(token_losses(spec.bind(params), micro, jax.random.key(1))[0])

            return params, jax.jit(jax.value_and_grad(loss_of))(params)

    params, want = loss_and_grads()
    other_params, got = loss_and_grads(**variant)
    jax.tree.map(np.testing.assert_array_equal, params, other_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), want, got)


def test_no_product_is_made_for_the_gradient_of_a_frozen_kernel():
    def products(freeze: str) -> int:
        config = tiny_config(compute={"scan_layers": "false"})
        config.optim.freeze = freeze
        with jax.set_mesh(mesh_of(config)):
            training = make_training(config, mesh_of(config))
            step = make_train_step(training.spec, config)
            lowered = step.lower(training.abstract_state(), training.abstract_batch())
        return lowered.as_text().count("stablehlo.dot_general")

    assert products("") - products("blocks/.*kernel") == 2 * 6


@pytest.mark.slow
def test_a_step_of_layers_one_by_one_keeps_what_is_costly_to_compute():
    """A layer keeps 10 widths a token: its input, the stream after attention, queries, keys,
    values, attention's result, the hidden layer's 4. 14 with parameters and gradients; 39 if it
    kept norms and activations too."""

    def compiled(layers):
        config = tiny_config(num_layers=layers, max_seq_len=128, compute={"scan_layers": "false"})
        with jax.set_mesh(mesh_of(config)):
            return make_training(config, mesh_of(config)).compile_step()

    steps = [compiled(layers) for layers in (1, 3)]
    small, large = (step.memory_analysis().temp_size_in_bytes for step in steps)
    assert large - small < 2 * 17 * (8 * 128 * 32 * 4)
    copies = re.findall(r"= f32\[3,32,128\]\S* copy\(", steps[1].as_text())
    assert not copies, "the optimizer's moments are written in their place"


VARIANTS = {
    "gpt2": {},
    "modern": dict(
        position="rope",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        num_kv_heads=2,
        qk_norm=True,
        tie_embeddings=False,
        head_dim=16,
    ),
    "windows": dict(position="rope", window=5, full_attention_every=2, num_kv_heads=1),
    "vaswani": dict(
        position="sinusoidal", norm_position="post", activation="relu", scale_embeddings=True
    ),
    "bare": dict(position="none", activation="geglu", logit_softcap=5.0, mup_base_width=16),
    "bigbird": dict(attention_pattern="bigbird", sparse_block=3, random_blocks=1),
    "lsh": dict(attention_pattern="lsh", sparse_block=4),
}


@pytest.mark.parametrize(
    ("kind", "first", "reached"),
    [("decoder", 0, range(6, 11)), ("encoder", 0, range(6, 15)), ("encoder", 1, range(24))],
)
def test_a_pattern_reaches_as_far_as_it_says(kind, first, reached):
    """Two layers with a window of 3: position 10 depends on 6 to 10, in an encoder to 14, or on
    all by a global token, which sees all."""
    config = tiny_config(
        kind=kind,
        attention_pattern="longformer",
        sparse_block=3,
        global_tokens=first,
        position="rope",
    )
    with jax.set_mesh(mesh_of(config)):
        spec, params = build(config)
        tokens = tokens_of(config)[:1]
        state = jax.jit(lambda tokens: spec.bind(params).hidden(tokens)[0][0, 10])
        before = state(tokens)
        found = [
            at
            for at in range(24)
            if np.any(state(tokens.at[0, at].set(tokens[0, at] ^ 1)) != before)
        ]
    assert found == list(reached)


DECODED_AS = {"lsh": dict(sparse_block=24)}  # decoding does not hash: all are in one chunk


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_extension_equals_the_whole(variant):
    """A start of 7 tokens, then one at a time, written into the cache after every fifth."""
    config = tiny_config(**VARIANTS[variant])
    with jax.set_mesh(mesh_of(config)):
        spec, params = build(config)
        spec = spec.for_decoding()
        tokens = tokens_of(config)[:3]
        reading = ModelSpec(tiny_config(**VARIANTS[variant] | DECODED_AS.get(variant, {})), "xla")
        whole = jax.jit(lambda p: reading.for_decoding().bind(p)(tokens))(params)

        positions = jnp.broadcast_to(jnp.arange(24), (3, 24))

        @jax.jit
        def start(params):
            model, layers = spec.bind(params), decoding.split_layers(params, spec.model)["blocks"]
            read = decoding.prefill(model, layers, tokens[:, :7], positions[:, :7])[1]
            return write_recent(
                empty_cache(spec.config, 3, 24, spec.rules),
                Cache(read, positions[:, :7]),
                spec.rules,
            )

        @jax.jit
        def extend(params, t, cache, recent, slot):
            model, layers = spec.bind(params), decoding.split_layers(params, spec.model)["blocks"]
            x, recent = decoding.extend(
                model, layers, tokens[:, t], positions[:, t], cache, recent, slot
            )
            return decoding.next_logits(model, x, model.vocabulary.table()), recent

        cache, found, slots = (
            start(params),
            [],
            jax.jit(lambda: empty_cache(spec.config, 3, 5, spec.rules)),
        )
        join = jax.jit(lambda cache, recent: write_recent(cache, recent, spec.rules))
        for first in (7, 12, 17, 22):
            recent = slots()
            for t in range(first, min(first + 5, 24)):
                logits, recent = extend(params, t, cache, recent, jnp.asarray(t - first))
                found.append(logits)
            cache = join(cache, recent)
        np.testing.assert_allclose(np.stack(found, axis=1), whole[:, 7:], atol=1e-5)


def test_dropout_drops_the_stated_share_and_only_in_training():
    config = tiny_config(dropout=0.5)
    with jax.set_mesh(mesh_of(config)):
        spec, params = build(config)
        off, _ = build(tiny_config())
        tokens = tokens_of(config)
        call = jax.jit(lambda p, key: spec.bind(p)(tokens, dropout_key=key))
        silent = jax.jit(lambda p: spec.bind(p)(tokens))(params)
        np.testing.assert_array_equal(silent, jax.jit(lambda p: off.bind(p)(tokens))(params))
        one, two = call(params, jax.random.key(0)), call(params, jax.random.key(1))
        assert not np.allclose(one, silent) and not np.allclose(one, two)
        np.testing.assert_array_equal(one, call(params, jax.random.key(0)))


def test_dtypes():
    """bf16 compute: float32 parameters and logits, close to float32 numbers, not equal to them."""
    config = tiny_config()
    low = tiny_config(compute={"dtype": "bfloat16"})
    with jax.set_mesh(mesh_of(config)):
        spec, params = build(config)
        tokens = tokens_of(config)
        exact = jax.jit(lambda p: spec.bind(p)(tokens))(params)
        rough = jax.jit(lambda p: ModelSpec(low, "xla").bind(p)(tokens))(params)
        text = jax.jit(lambda p: ModelSpec(low, "xla").bind(p)(tokens)).lower(params).as_text()
    assert exact.dtype == rough.dtype == jnp.float32
    assert "bf16" in text
    real = slice(0, config.model.vocab_size)
    difference = np.abs(np.asarray(exact - rough)[..., real]).max()
    assert 0 < difference < 0.02


GPT2_CHANGES = {
    "vocab_size": 300,
    "max_seq_len": 20,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 16,
    "embed_dim": 64,
    "mlp_dim": 96,
    "norm": "rmsnorm",
    "norm_eps": 1e-3,
    "norm_position": "post",
    "position": "rope",
    "activation": "relu",
    "bias": False,
    "tie_embeddings": False,
    "scale_embeddings": True,
    "qk_norm": True,
    "window": 4,
    "logit_softcap": 30.0,
    "mup_base_width": 16,
    "dropout": 0.1,
    "attention_pattern": "strided",
    "kind": "encoder",
    "type_vocab_size": 2,
    "embedding_norm": True,
    "head_transform": True,
    "head_bias": True,
    "scale_attention": False,
    "scale_logits": True,
}
SPARSE_CHANGES = {
    "longformer": {"sparse_block": 5, "global_tokens": 2, "dilation": 2},
    "strided": {"sparse_block": 5},
    "axial": {"sparse_block": 6},
    "bigbird": {"sparse_block": 5, "global_tokens": 2, "random_blocks": 3},
    "lsh": {"sparse_block": 5, "hash_rounds": 3},
}
COMPUTE_CHANGES = {
    "dtype": "bfloat16",
    "param_dtype": "bfloat16",
    "remat": "full",
    "scan_layers": "false",
    "fake_quantise": "int8",
    "matmul": "int8",
}
MODERN_CHANGES = {
    "qkv_bias": True,
    "rope_theta": 500.0,
    "rope_factor": 4.0,
    "rope_original_len": 99,
    "rope_scaling": "linear",
    "rope_beta_fast": 9.0,
    "rope_beta_slow": 0.1,
    "rope_attention_factor": 1.5,
    "full_attention_every": 1,
}
ENCODER_DECODER = ("encoder_layers", "max_source_len", "relative_buckets", "relative_max_distance")
EXPERT_CHANGES = {
    "num_experts": 6,
    "expert_every": 2,
    "first_dense_layers": 1,
    "experts_per_token": 3,
    "expert_dim": 20,
    "shared_experts": 2,
    "router": "softmax_topk",
    "normalize_gates": False,
    "gate_scale": 2.0,
    "expert_capacity": 1.0,
    "balance_loss": 0.1,
    "router_z_loss": 0.1,
    "router_bias_rate": 0.1,
}
LORA_CHANGES = {"rank": 3, "alpha": 8.0, "targets": "out", "dora": True}


def gpt2() -> Config:
    return tiny_config(dropout=0.2)  # without dropout nothing reads the seed


def modern() -> Config:
    """What GPT-2's shape leaves without effect has one here."""
    config = tiny_config(
        bias=False,
        position="rope",
        rope_scaling="yarn",
        rope_factor=2.0,
        rope_theta=1000.0,
        rope_original_len=512,
        window=4,
    )
    config.lora.rank = 2
    config.optim.schedule, config.optim.lr_multipliers = "wsd", "lora_in=0.5"
    return config


def traced(config: Config) -> str:
    """The train step's program with its shardings, and its constants."""
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        step = make_train_step(training.spec, config)
        found = step.trace(training.abstract_state(), training.abstract_batch()).jaxpr
        return f"{found} {[np.asarray(c).tolist() for c in found.consts]}"


OPTIM_CHANGES = {
    "name": "lion",
    "schedule": "linear",
    "warmup_steps": 5,
    "warmup_fraction": 0.5,
    "lr_multipliers": ".=0.1",
    "z_loss": 1e-4,
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "freeze": "query",
    "moment_dtype": "bfloat16",
}


@pytest.mark.parametrize("attention", SPARSE_CHANGES)
def test_every_field_of_a_pattern_changes_what_is_seen(attention):
    model = ModelConfig(max_seq_len=24, attention_pattern=attention, sparse_block=4)
    for name, value in SPARSE_CHANGES[attention].items():
        for one, other in zip(
            patterns_of(model), patterns_of(dataclasses.replace(model, **{name: value}))
        ):
            assert one != other, name


@pytest.mark.slow
def test_every_field_of_a_mixture_changes_the_program():
    fields = dict(num_experts=4, router="sigmoid_topk", num_layers=2)
    before = traced(tiny_config(**fields))
    assert traced(tiny_config(**fields)) == before
    for name, value in EXPERT_CHANGES.items():
        assert traced(tiny_config(**fields | {name: value})) != before, name


# On one device they change nothing; tests of meshes have them
ON_MESHES = "compute.attention", "compute.context_attention", "compute.slice_gradient_dtype"


@pytest.mark.parametrize("base", [gpt2, modern])
def test_no_field_is_read_by_nobody(base):
    """Perturbing any model or optimizer field changes the train step's program."""
    before, untouched = traced(base()), set(ON_MESHES)
    assert traced(base()) == before
    for path in fields_of(base()):
        room, _, name = path.rpartition(".")
        config = base()
        value = get_field(config, path)
        if room == "model":
            changes = MODERN_CHANGES if base is modern else GPT2_CHANGES
            if name not in changes:
                untouched.add(path)
                continue
            value = changes[name]
        elif room in ("compute", "lora"):
            changes = COMPUTE_CHANGES if room == "compute" else LORA_CHANGES
            if (base is modern) != (room == "lora") or name not in changes:
                untouched.add(path)
                continue
            value = changes[name]
        elif room == "optim":
            if base is gpt2 and name == "decay_fraction":
                untouched.add(path)
                continue
            value = OPTIM_CHANGES[name] if name in OPTIM_CHANGES else value / 2
        elif path in ("seed", "num_steps", "batch_size", "grad_accum") and base is gpt2:
            value = 2 * value or 1
        else:
            continue
        set_field(config, path, value)
        assert traced(config) != before, f"{path} changes nothing"
    other = GPT2_CHANGES if base is modern else MODERN_CHANGES
    group, rest = ("compute", COMPUTE_CHANGES) if base is modern else ("lora", LORA_CHANGES)
    named = {f"model.{n}" for n in other} | {f"{group}.{n}" for n in rest}
    named |= {*ON_MESHES, "optim.decay_fraction"}
    named |= {f"model.{n}" for n in EXPERT_CHANGES} | {"compute.expert_buffer"}
    named |= {f"compute.pipeline_{n}" for n in ("microbatches", "rounds")}  # test_pipeline.py
    named |= {f"model.{n}" for changes in SPARSE_CHANGES.values() for n in changes}
    named |= {f"model.{n}" for n in ENCODER_DECODER}  # tests/model/test_encoder_decoder.py
    assert untouched <= named, f"no test perturbs {untouched - named}"
