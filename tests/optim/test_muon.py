"""Muon on any mesh: its matrices are dealt out, and nothing else changes."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optax.contrib import scale_by_muon

from jaxgpt.optim.muon import dimension_numbers, scale_by_dealt_muon
from jaxgpt.parallel.mesh import AXES

SHAPES = {  # of four layers: 8 matrices of 16 x 16, 4 of 16 x 8 and 8 of 16 x 24
    "attention/query": (4, 16, 4, 4),
    "attention/key": (4, 16, 2, 4),
    "attention/out": (4, 4, 4, 16),
    "mlp/up": (4, 16, 24),
    "mlp/down": (4, 24, 16),
}


def kernels(seed: int, specs: dict[str, P] | None) -> dict:
    """Stacked kernels, split as `specs` says."""
    rng = np.random.default_rng(seed)
    blocks = {"attention": {}, "mlp": {}}
    for path, shape in SHAPES.items():
        part, name = path.split("/")
        array = rng.normal(size=shape).astype(np.float32)
        blocks[part][name] = {"kernel": jax.device_put(array, specs and specs[path])}
    return {"blocks": blocks}


def third_update(optimizer, specs: dict[str, P] | None = None) -> tuple[dict, dict]:
    """Returns the third update and the state after it."""
    state, update = optimizer.init(kernels(0, specs)), jax.jit(optimizer.update)
    for seed in range(1, 4):
        updates, state = update(kernels(seed, specs), state)
    return updates, state


@pytest.fixture(scope="module")
def wanted():
    """What optax does on one device."""
    return third_update(scale_by_muon(beta=0.9, weight_dimension_numbers=dimension_numbers))


@pytest.mark.parametrize(
    "mesh, axes, torus",
    [
        ({"data": 8}, {}, ()),
        ({"fsdp": 8}, {"embed": "fsdp"}, (4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"embed": "fsdp", "heads": "tensor"}, ()),
        ({"fsdp": 4, "expert": 2}, {"embed": ("fsdp", "expert")}, (2, 2)),
        ({"expert": 2, "tensor": 2, "data": 2}, {"heads": "tensor", "layers": "expert"}, ()),
    ],
)
def test_dealt_out_equals_optax(wanted, mesh, axes, torus):
    """Of more matrices than devices, and fewer. Momentum and updates stay split as parameters."""
    embed, heads, layers = (axes.get(name) for name in ("embed", "heads", "layers"))
    specs = {
        "attention/query": P(layers, embed, heads, None),
        "attention/key": P(layers, embed, heads, None),
        "attention/out": P(layers, heads, None, embed),
        "mlp/up": P(layers, embed, heads),
        "mlp/down": P(layers, heads, embed),
    }
    sizes = [mesh.get(axis, 1) for axis in AXES]
    with jax.set_mesh(jax.make_mesh(sizes, AXES, (AxisType.Explicit,) * len(AXES))):
        found = third_update(scale_by_dealt_muon(0.9, None, torus), specs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)
    updates, state = found
    for tree in (updates, state.mu):
        for path, spec in specs.items():
            part, name = path.split("/")
            assert tree["blocks"][part][name]["kernel"].sharding.spec == spec
