"""The update against optax's own AdamW, the schedule by hand, and what decays."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.config import Config, ModelConfig, OptimConfig
from jaxgpt.config.validate import changed, validate
from jaxgpt.model import ModelSpec
from jaxgpt.model.layers import hidden_std
from jaxgpt.optim.groups import decay_mask, lr_factors
from jaxgpt.optim.optimizers import make_optimizer
from jaxgpt.optim.schedules import make_schedule
from jaxgpt.system.errors import BadInput
from tests.conftest import mesh_of, tiny_config


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_ten_steps_equal_optax_adamw(clip_norm):
    cfg = OptimConfig(
        learning_rate=0.1, warmup_steps=3, weight_decay=0.3, b1=0.8, b2=0.9, clip_norm=clip_norm
    )
    rng = np.random.default_rng(0)
    params = {
        "up": {
            "kernel": jnp.asarray(rng.normal(size=(3, 4))),
            "bias": jnp.asarray(rng.normal(size=4)),
        }
    }
    reference = optax.adamw(
        make_schedule(cfg, 10),
        b1=0.8,
        b2=0.9,
        eps=cfg.eps,
        weight_decay=0.3,
        mask={"up": {"kernel": True, "bias": False}},
    )
    ours = make_optimizer(cfg, 10, ModelConfig())
    state, want_state, want = ours.init(params), reference.init(params), params
    for _ in range(10):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
        updates, state = ours.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
        assert norm > 1, "clipping must bite"
        scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
        clipped = jax.tree.map(lambda g, s=scale: g * s, grads)
        updates, want_state = reference.update(clipped, want_state, want)
        want = optax.apply_updates(want, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, want)


def test_schedules():
    def rates(**fields):
        cfg = OptimConfig(learning_rate=2.0, warmup_steps=4, final_lr_ratio=0.1, **fields)
        return [float(make_schedule(cfg, 12)(count)) for count in range(14)]

    cosine = rates(schedule="cosine")
    np.testing.assert_allclose(cosine[:4], [0.5, 1.0, 1.5, 2.0])
    middle = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 3 / 8)))
    np.testing.assert_allclose(cosine[6], middle, rtol=1e-6)
    np.testing.assert_allclose(cosine[11:], [0.2] * 3, rtol=1e-6)
    linear = rates(schedule="linear")
    np.testing.assert_allclose(linear[7], 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(linear[11], 0.2, rtol=1e-6)
    assert rates(schedule="constant")[4:] == [2.0] * 10
    no_warmup = OptimConfig(learning_rate=2.0, warmup_steps=0)
    assert float(make_schedule(no_warmup, 10)(0)) < 2.0, "the first step is already on the curve"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant", "rsqrt"])
def test_warmup_as_a_share(schedule):
    """The same rates as by the number of steps that the share is, for any number of steps."""
    fields = dict(learning_rate=2.0, schedule=schedule)
    for num_steps, warmup in ((40, 4), (15, 2), (4, 0)):
        share = OptimConfig(warmup_fraction=0.1, **fields)
        number = OptimConfig(warmup_steps=warmup, **fields)
        rates = [
            [float(make_schedule(cfg, num_steps)(count)) for count in range(num_steps)]
            for cfg in (share, number)
        ]
        assert rates[0] == rates[1] and len(set(rates[0])) > 1 - (warmup < 2)


def test_warmup_is_given_once():
    config = Config(optim=OptimConfig(warmup_steps=7, warmup_fraction=0.1))
    with pytest.raises(BadInput, match="warmup_steps=7 and optim.warmup_fraction=0.1 are both"):
        validate(config)
    for steps in (0, OptimConfig.warmup_steps):
        validate(changed(config, {"optim.warmup_steps": steps}))


def test_every_parameter_is_covered_by_the_decay_mask():
    with jax.set_mesh(mesh_of(tiny_config())):
        abstract = jax.eval_shape(ModelSpec(tiny_config(), "xla").init, jax.random.key(0))
    with pytest.raises(ValueError, match="no rule says whether parameter blocks/gain decays"):
        decay_mask({"blocks": {"gain": 1.0}})
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(abstract))
    decayed = {jax.tree_util.keystr(path, simple=True, separator="/") for path, d in mask if d}
    matrices = {"attention/query", "attention/key", "attention/value", "attention/out"}
    matrices |= {"mlp/up", "mlp/down"}
    kernels = {f"blocks/{name}/kernel" for name in matrices}
    assert decayed == {"tokens", "positions/kernel"} | kernels
    assert len(mask) == len(jax.tree.leaves(abstract))


NAMES = {
    "blocks": {
        "attention": {"query": {"kernel": (2, 6, 3, 2)}, "out": {"kernel": (2, 3, 2, 6)}},
        "mlp": {"up": {"kernel": (2, 6, 8), "bias": (2, 8)}},
    },
    "tokens": (9, 6),
}


def tree(rng):
    """Random arrays of the shapes that a model with two layers has."""
    shapes = jax.tree.map(lambda s: s, NAMES, is_leaf=lambda s: isinstance(s, tuple))
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def run_ten(name: str, **fields):
    """Ten steps of ours; the gradients, for a reference to follow; the first parameters."""
    cfg = OptimConfig(
        name=name,
        learning_rate=0.05,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.2,
        clip_norm=0.0,
        **fields,
    )
    rng = np.random.default_rng(3)
    with jax.set_mesh(mesh_of(tiny_config())):
        first = params = tree(rng)
        optimizer = make_optimizer(cfg, 10, ModelConfig())
        state, grads = optimizer.init(params), []
        update = jax.jit(optimizer.update)
        for _ in range(10):
            grads.append(tree(rng))
            updates, state = update(grads[-1], state, params)
            params = optax.apply_updates(params, updates)
    return cfg, first, grads, params


def follow(first, grads, got, make_leaf_update):
    """Checks `got` against a NumPy rule applied leaf by leaf in float64."""
    paths = jax.tree_util.tree_leaves_with_path(first)
    for i, (path, leaf) in enumerate(paths):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        p, direction = np.asarray(leaf, np.float64), make_leaf_update(name)
        decay = 0.0 if name.endswith("bias") else 0.2
        for step in range(10):
            g = np.asarray(jax.tree.leaves(grads[step])[i], np.float64)
            p = p - 0.05 * (direction(g, step + 1) + decay * p)
        ours = np.asarray(jax.tree.leaves(got)[i])
        np.testing.assert_allclose(ours, p, atol=2e-4, err_msg=name)


def numpy_adam(b1, b2, eps):
    m = v = 0.0

    def direction(g, step):
        nonlocal m, v
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        return m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + eps)

    return direction


def test_lion_against_numpy():
    cfg, first, grads, got = run_ten("lion", b1=0.9, b2=0.8)

    def rule(name):
        m = 0.0

        def direction(g, step):
            nonlocal m
            d, m = np.sign(0.9 * m + 0.1 * g), 0.8 * m + 0.2 * g
            return d

        return direction

    follow(first, grads, got, rule)


def test_sgd_against_numpy():
    cfg, first, grads, got = run_ten("sgd", b1=0.7)

    def rule(name):
        m = 0.0

        def direction(g, step):
            nonlocal m
            m = g + 0.7 * m
            return m

        return direction

    follow(first, grads, got, rule)


WIDE = {  # large enough to be factored, over axes of which the two longest are not the matrix's
    "blocks": {
        "attention": {
            "query": {"kernel": (2, 130, 3, 129), "bias": (2, 3, 129), "lora_in": (2, 130, 4)},
            "out": {"kernel": (2, 3, 50, 140), "lora_out": (2, 4, 140)},
        },
        "mlp": {"up": {"kernel": (2, 130, 150), "bias": (2, 150)}},
        "mlp_norm": {"scale": (2, 130)},
    },
    "tokens": (140, 130),
    "final_norm": {"scale": (130,)},
}
INPUTS = {"query": 1, "out": 2, "up": 1}  # axes of one layer's kernel that are its inputs


def test_adafactor_equals_optax_on_each_layers_own_matrix():
    """Layer 1's gradients grow, so that its updates are clipped and layer 0's are not."""
    cfg = OptimConfig(
        name="adafactor",
        learning_rate=0.05,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.0,
        clip_norm=0.0,
    )
    rng, is_shape = np.random.default_rng(3), lambda x: isinstance(x, tuple)

    def draw(shape, step):
        found = rng.normal(size=shape)
        if len(shape) > 1:
            found[1] *= 3.0**step
        return jnp.asarray(found, jnp.float32)

    optimizer = make_optimizer(cfg, 10, ModelConfig())
    with jax.set_mesh(mesh_of(tiny_config())):
        params = jax.tree.map(lambda shape: draw(shape, 0), WIDE, is_leaf=is_shape)
        state, update, ours, grads = optimizer.init(params), jax.jit(optimizer.update), [], []
        for step in range(4):
            drawn = functools.partial(draw, step=step)
            grads.append(jax.tree.map(drawn, WIDE, is_leaf=is_shape))
            updates, state = update(grads[-1], state, params)
            ours.append(updates)
    reference = optax.adafactor(
        learning_rate=0.05,
        multiply_by_parameter_scale=False,
        weight_decay_rate=None,
        clipping_threshold=1.0,
        momentum=None,
    )

    def matrix(path, leaf):
        *_, layer, name = path
        inputs = {"kernel": INPUTS.get(layer), "lora_in": 1, "lora_out": 1}.get(name)
        shape = leaf.shape[:inputs] if inputs else ()
        return leaf.reshape(*([math.prod(shape)] if shape else []), -1)

    def follow_optax(path, grads, ours):
        state = reference.init(grads[0])
        for grad, got in zip(grads, ours):
            want, state = reference.update(grad, state, grad)
            np.testing.assert_allclose(got, want, atol=2e-6, err_msg="/".join(path))

    def leaves(tree):
        found = jax.tree_util.tree_leaves_with_path(tree)
        return [(tuple(key.key for key in path), leaf) for path, leaf in found]

    for i, (path, leaf) in enumerate(leaves(params)):
        each = [[leaves(tree)[i][1] for tree in trees] for trees in (grads, ours)]
        if path[0] != "blocks":
            follow_optax(path, *each)
            continue
        for l in range(leaf.shape[0]):
            follow_optax(path, *([matrix(path, x[l]) for x in xs] for xs in each))


def newton_schulz(x):
    """Muon's quintic iteration (Jordan et al. 2024) on one matrix, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if turned else x


def test_muon_against_numpy():
    cfg, first, grads, got = run_ten("muon", b1=0.9, b2=0.95)
    flat = {"query": (6, 6), "out": (6, 6), "up": (6, 8)}  # inputs x outputs, of each layer

    def rule(name):
        if not name.startswith("blocks") or name.endswith("bias"):
            return numpy_adam(0.9, 0.95, cfg.eps)
        shape, m = flat[name.split("/")[-2]], 0.0

        def direction(g, step):
            nonlocal m
            m = 0.9 * m + 0.1 * g
            nesterov = 0.9 * m / (1 - 0.9 ** (step + 1)) + 0.1 * g / (1 - 0.9**step)
            layers = [newton_schulz(layer.reshape(shape)) for layer in nesterov]
            return 0.2 * np.sqrt(max(shape)) * np.stack(layers).reshape(g.shape)

        return direction

    follow(first, grads, got, rule)


def test_wsd_and_rsqrt():
    def rates(**fields):
        cfg = OptimConfig(learning_rate=2.0, warmup_steps=4, final_lr_ratio=0.1, **fields)
        return [float(make_schedule(cfg, 24)(count)) for count in range(24)]

    wsd = rates(schedule="wsd", decay_fraction=0.5)  # steps 5..24; the last ten descend
    np.testing.assert_allclose(wsd[4:14], [2.0] * 10, rtol=1e-6)
    np.testing.assert_allclose(wsd[18], 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(wsd[23], 0.2, rtol=1e-6)
    rsqrt = rates(schedule="rsqrt")
    np.testing.assert_allclose(rsqrt[3:], 2.0 * np.sqrt(4 / np.arange(4, 25)), rtol=1e-6)


def test_learning_rate_multipliers():
    _, first, grads, got = run_ten("sgd", lr_multipliers="tokens=0,query=2,blocks=0.5")
    _, _, _, plain = run_ten("sgd")
    np.testing.assert_array_equal(got["tokens"], first["tokens"])
    one = run_ten("sgd", lr_multipliers="up/bias=0.5")[3]["blocks"]["mlp"]["up"]["bias"]
    bias = first["blocks"]["mlp"]["up"]["bias"]
    np.testing.assert_allclose(
        one - bias, 0.5 * (plain["blocks"]["mlp"]["up"]["bias"] - bias), rtol=1e-4, atol=1e-6
    )
    assert not np.allclose(
        got["blocks"]["attention"]["query"]["kernel"],
        plain["blocks"]["attention"]["query"]["kernel"],
    )
    for text, message in (
        ("nothing=2", "'nothing' matches no parameter"),
        ("tokens", "is not PATTERN=FACTOR"),
        ("tokens=x", "is not PATTERN=FACTOR"),
        ("(=1", "is not PATTERN=FACTOR"),
        ("tokens=-1", "a factor >= 0"),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            run_ten("sgd", lr_multipliers=text)


def test_mup_rules_by_the_paper():
    """arXiv:2203.03466, table 8 for Adam, at four times the base width: hidden matrices learn at a
    quarter of the rate and start at half the deviation; all else stays."""
    model = ModelConfig(embed_dim=128, mup_base_width=32).with_sizes()
    params = {"blocks": {"mlp": {"up": {"kernel": 0, "bias": 0}}}, "tokens": 0}
    factors = lr_factors(params, "bias=3,kernel=2", model)
    assert factors == {"blocks": {"mlp": {"up": {"kernel": 0.5, "bias": 3.0}}}, "tokens": 1.0}
    assert hidden_std(model) == 0.02 / 2
    assert hidden_std(ModelConfig(embed_dim=128)) == 0.02


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon"])
def test_first_moments_in_half_the_bytes(name):
    """They are bfloat16 and the second moments are not; ten updates stay near those of float32."""
    config = tiny_config()

    def ten(dtype: str):
        cfg = OptimConfig(name=name, learning_rate=1e-2, warmup_steps=0, moment_dtype=dtype)
        with jax.set_mesh(mesh_of(config)):
            params = jax.jit(ModelSpec(config, "xla").init)(jax.random.key(0))
            optimizer = make_optimizer(cfg, 10, config.model)
            state, update = optimizer.init(params), jax.jit(optimizer.update)
            for k in range(10):
                keys = jax.random.split(jax.random.key(k), len(jax.tree.leaves(params)))
                keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
                grads = jax.tree.map(
                    lambda p, key: p + jax.random.normal(key, p.shape), params, keys
                )
                updates, state = update(grads, state, params)
                params = optax.apply_updates(params, updates)
        return params, {str(leaf.dtype) for leaf in jax.tree.leaves(state)}, state

    whole, kinds, _ = ten("")
    assert "bfloat16" not in kinds
    half, kinds, _ = ten("bfloat16")
    assert "bfloat16" in kinds and (name not in ("adamw", "muon") or "float32" in kinds)
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(whole), strict=True):
        close = np.abs(np.asarray(a) - np.asarray(b)) < 2e-2
        assert close.mean() > 0.95 and a.dtype == b.dtype


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clipping_is_optax_own(most):
    """The norm is 13: one bound is below it, the other above."""
    from jaxgpt.optim.optimizers import clip_by_norm

    grads = {"a": jnp.float32([3, 4]), "b": jnp.float32([[12]])}
    ours, theirs = (f(most) for f in (clip_by_norm, optax.clip_by_global_norm))
    got, want = (f.update(grads, f.init(grads), grads)[0] for f in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
