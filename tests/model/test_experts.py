"""Mixtures of experts against a loop over experts, on one device and on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt.config import MeshConfig
from jaxgpt.model.experts import Experts, dispatch, feed_forward
from jaxgpt.model.experts.grouped import collect, group, products, spread
from jaxgpt.parallel.mesh import AXES, rules_of
from jaxgpt.planning.program import Program
from tests.conftest import mesh_of, tiny_config

EXPERTS, WIDTH = 8, 24


def mixture(**fields):
    """A config whose layers have eight experts of width 24."""
    given = dict(num_experts=EXPERTS, experts_per_token=3, expert_dim=WIDTH, activation="swiglu")
    return tiny_config(**(given | dict(bias=False) | fields))


def layer(config) -> tuple:
    """(the graph, the sharded random parameters, x, weights of the sum that is derived)."""

    def draw(a, rng):
        values = rng.normal(size=a.shape) * (0.3 if a.ndim > 1 else 0.05)
        return jax.device_put(values.astype(a.dtype), a.sharding.spec)

    rules = rules_of(jax.sharding.get_mesh())
    made = nnx.eval_shape(lambda: Experts(config, rules, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(made)
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 8, 24, 32)).astype(np.float32)
    return graph, jax.tree.map(lambda a: draw(a, rng), state), x, weight


def value_and_gradient(config):
    """Of one mixture: (its output, (gradients of the parameters, of x)) and its figures; plain
    arrays."""
    with jax.set_mesh(mesh := mesh_of(config)):
        rules, (graph, params, x, weight) = rules_of(mesh), layer(config)
        x, weight = (jax.device_put(a, rules("batch", None, None)) for a in (x, weight))

        def total(params, x):
            y, figures = nnx.merge(graph, params)(x)
            return jnp.sum(y * weight), (y, figures)

        run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (_, (y, figures)), (of_params, of_x) = run(params, x)
        return jax.device_get(((y, (nnx.to_pure_dict(of_params), of_x)), figures))


def one_expert(weights, x):
    hidden = x @ weights["up"]
    if "gate" in weights:
        return (jax.nn.silu(x @ weights["gate"]) * hidden) @ weights["down"]
    return jax.nn.gelu(hidden, approximate=True) @ weights["down"]


def loop_over_experts(params, x, config):
    """The same in float64, expert by expert, by jax.numpy for its gradient."""
    cfg = config.model
    logits = x @ params["router"]["kernel"]
    shares = jax.nn.softmax(logits) if cfg.router == "softmax_topk" else jax.nn.sigmoid(logits)
    bias = params["router"].get("bias", 0)
    order = jnp.argsort(-(shares + bias), axis=-1)[..., : cfg.experts_per_token]
    y = jnp.zeros_like(x)
    total = sum(
        jnp.take_along_axis(shares, order[..., i : i + 1], axis=-1)[..., 0]
        for i in range(cfg.experts_per_token)
    )
    for e in range(cfg.num_experts):
        weights = {name: part["kernel"][e] for name, part in params["experts"].items()}
        gate = jnp.where(jnp.any(order == e, axis=-1), shares[..., e], 0)
        gate = cfg.gate_scale * gate / (total if cfg.normalize_gates else 1)
        y += gate[..., None] * one_expert(weights, x)
    if cfg.shared_experts:
        y += one_expert({name: part["kernel"] for name, part in params["shared"].items()}, x)
    return y


def assert_close(found, wanted):
    """Within 1e-5 of each array's largest entry: float32's rounding over sums of a hundred."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()),
        found,
        wanted,
    )


CASES = {
    "mixtral": {},
    "qwen": dict(experts_per_token=1, normalize_gates=False),
    "deepseek": dict(router="sigmoid_topk", gate_scale=2.5, shared_experts=2),
    "plain": dict(activation="gelu_tanh"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mixture_is_a_loop_over_experts(case):
    config = mixture(**CASES[case])
    with jax.set_mesh(mesh_of(config)):
        _, params, x, weight = jax.device_get(layer(config))
    (y, grads), _ = value_and_gradient(config)
    with jax.enable_x64(True):
        pure = jax.tree.map(np.float64, nnx.to_pure_dict(params))
        loop = lambda params, x: loop_over_experts(params, x, config)  # noqa: E731
        wanted, backward = jax.vjp(loop, pure, np.float64(x))
        wanted = wanted, backward(np.float64(weight))
    grads[0]["router"].pop("bias", None), wanted[1][0]["router"].pop("bias", None)
    assert_close((y, grads), wanted)


MESHES = {"expert": (1, 1, 1, 4), "expert fsdp": (1, 4, 1, 2), "all": (1, 2, 2, 2)}


@pytest.mark.parametrize(
    ("mesh", "buffer"), [("expert", 0.3), ("expert fsdp", 1.25), ("expert fsdp", 0.3), ("all", 0.3)]
)
def test_experts_on_a_mesh_equal_one_device(mesh, buffer, monkeypatch):
    """Also where the tokens need further rounds, as they do with a third of the mean, and where the
    experts' width is computed in three parts."""
    monkeypatch.setattr(feed_forward, "MOST_BYTES", 4 * 32 * WIDTH * 4 // 3)
    monkeypatch.setattr(feed_forward, "LANES", 8)
    config = mixture(compute=dict(expert_buffer=buffer), router="sigmoid_topk")
    alone = value_and_gradient(config)
    spread = value_and_gradient(dataclasses.replace(config, mesh=MeshConfig(*MESHES[mesh])))
    assert_close(spread, alone)


def ragged_all_to_all(operand, output, starts, going, places, coming, *, axis_name):
    """What `jax.lax.ragged_all_to_all` does, which CPUs lack, after its documentation; NaN where
    what comes is not what goes."""
    me, row = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    all_of = jax.lax.all_gather((operand, starts, going, places), axis_name)
    for device in range(jax.lax.axis_size(axis_name)):
        rows, first, size, place = (a[device] for a in all_of)
        written = (row >= place[me]) & (row < place[me] + size[me])
        rows = rows[jnp.clip(row - place[me] + first[me], 0, len(rows) - 1)]
        output = jnp.where(written[:, None], rows, output)
        output = jnp.where(coming[device] == size[me], output, jnp.nan)
    return output


def test_tokens_that_travel_without_padding_equal_one_device(monkeypatch):
    """As on TPUs, in rounds."""
    monkeypatch.setattr(dispatch, "on_tpu", lambda: True)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    config = mixture(compute=dict(expert_buffer=0.5), num_layers=1)
    alone = value_and_gradient(config)
    spread = value_and_gradient(dataclasses.replace(config, mesh=MeshConfig(*MESHES["expert"])))
    assert_close(spread, alone)


def test_a_full_expert_drops_the_rest_of_a_sequence_and_says_so():
    """With room for one choice an expert takes a sequence's first alone."""
    whole, tight = mixture(), mixture(expert_capacity=EXPERTS / 24 / 3, num_layers=1)
    (y, grads), figures = value_and_gradient(tight)
    assert figures["dropped_share"] == pytest.approx(1 - EXPERTS / 24 / 3)
    with jax.set_mesh(mesh_of(whole)):
        _, params, x, _ = jax.device_get(layer(whole))
    kernel = nnx.to_pure_dict(params)["router"]["kernel"]
    order = np.argsort(-(x @ kernel), axis=-1)[..., :3]
    seen = np.array(
        [[np.isin(order[b, t], order[b, :t]).all() for t in range(24)] for b in range(8)]
    )
    assert seen.any() and not seen.all()
    np.testing.assert_array_equal(np.any(y != 0, axis=-1), ~seen)
    assert not np.any(grads[1][seen]), (
        "a token that no expert took has no gradient but the router's"
    )


def test_auxiliary_losses_are_those_of_the_papers():
    config = mixture(balance_loss=0.3, router_z_loss=0.2, num_layers=1)
    _, figures = value_and_gradient(config)
    with jax.set_mesh(mesh_of(config)):
        _, params, x, _ = jax.device_get(layer(config))
    logits = np.float64(x) @ nnx.to_pure_dict(params)["router"]["kernel"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)[..., :3]
    often = np.array([(order == e).any(-1).mean() for e in range(EXPERTS)])
    balance = EXPERTS * np.sum(often * p.mean((0, 1)))
    z_loss = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    wanted = {
        "balance_loss": balance,
        "router_z_loss": z_loss,
        "auxiliary_loss": 0.3 * balance + 0.2 * z_loss,
        "expert_share": often / 3,
        "expert_load": often.max() * EXPERTS / 3,
        "router_entropy": -np.mean(np.sum(p * np.log(p), -1)),
        "dropped_share": 0.0,
    }
    assert figures.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("block", [1, 4])
def test_rows_come_back_in_order_from_groups(block):
    """By blocks that groups do not fill, with an empty group and items of none."""
    ids = jnp.array([2, 0, 3, 3, 2, 2, 5, 0, 2, 5])  # of five groups
    x = jax.random.normal(jax.random.key(0), (5, 3))
    w = jax.random.normal(jax.random.key(1), (5, 3, 2))
    at = group(ids, 5, block)
    assert at.sizes.tolist() == [-(-n // block) * block for n in (2, 0, 4, 2, 0)]
    y = collect(products(spread(x, at, 2), w, at.sizes, block), at)
    wanted = [x[i // 2] @ w[e] if e < 5 else np.zeros(2) for i, e in enumerate(ids.tolist())]
    np.testing.assert_allclose(y, wanted, rtol=1e-5)


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (1, 2, 2, 2)])
def test_one_token_reads_its_own_experts_alone(mesh):
    """In decoding, where all devices have the token: FLOPs and bytes read, as the compiled program
    has them, do not grow with the number of experts, and no matrix is sent."""

    def decode(experts: int, x):
        config = mixture(num_experts=experts, expert_dim=512)
        config = dataclasses.replace(config, mesh=MeshConfig(*mesh))
        with jax.set_mesh(devices := mesh_of(config)):
            rules = dataclasses.replace(rules_of(devices), split_batch=False)
            made = nnx.eval_shape(lambda: Experts(config, rules, rngs=nnx.Rngs(0)))
            graph, params = nnx.split(made)[0], layer(config)[1]
            x = jax.device_put(x, rules("batch", None, None))
            run = jax.jit(lambda params, x: nnx.merge(graph, params)(x)[0])
            compiled = run.lower(params, x[:1, :1]).compile()
            return jax.device_get(run(params, x)), compiled, devices.devices.shape

    def costs(experts: int) -> np.ndarray:
        _, compiled, shape = decode(experts, x)
        program = Program(compiled.as_text())
        sent = sum(c.bytes for c in program.collectives(AXES, shape))
        assert sent < 32 * 512 * 4, "less than one matrix of one expert"
        return np.array([compiled.cost_analysis()["flops"], program.hbm_bytes()])

    config = mixture(expert_dim=512)
    with jax.set_mesh(mesh_of(config)):
        _, params, x, _ = jax.device_get(layer(config))
    wanted = loop_over_experts(nnx.to_pure_dict(params), x, config)
    np.testing.assert_allclose(decode(EXPERTS, x)[0], wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.all(costs(64) <= 1.5 * costs(8)), (costs(64), costs(8))
