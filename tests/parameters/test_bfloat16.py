"""`compute.dtype=bfloat16` on one CPU: products in bfloat16, the rest in float32."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.parallel.fsdp import product
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parameters.bfloat16 import BFLOAT16
from jaxgpt.training.setup import make_training
from tests.conftest import mesh_of, tiny_config

ROUNDING = 2**-8  # of a factor, relative: half a unit in the last of bfloat16's 8 bits


def test_the_step_on_a_cpu_multiplies_in_bfloat16_and_is_closer_to_float32():
    """In XLA's own program: three products of each of six projections, and at least three of the
    head, have factors that it did not turn back into float32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(num_layers=1, compute={"dtype": dtype})
        with jax.set_mesh(mesh := mesh_of(config)):
            training = make_training(config, mesh)
            state, batch = training.first_state(), training.abstract_batch()
            rng = np.random.default_rng(0)
            batch = {n: jnp.asarray(rng.integers(0, 9, a.shape, a.dtype)) for n, a in batch.items()}
            batch = {n: jax.device_put(a, training.batch_sharding) for n, a in batch.items()}
            step = training.compile_step()
            text, losses[dtype] = step.as_text(), float(step(state, batch)[1]["loss"])
    products = [part for part in text.split("\n}") if " dot(" in part]
    assert sum("parameter" in part and "bf16[" in part for part in products) >= 3 * 6 + 3
    assert 0 < abs(losses["float32"] - losses["bfloat16"]) < 1e-3


def test_products_and_gradients_are_those_of_rounded_factors():
    """Against float64: each result is within its factors' rounding, and is not float32's."""
    config, rng = tiny_config(), np.random.default_rng(0)
    x, w, grad_y = (rng.normal(size=s) for s in ((2, 16, 24), (24, 40), (2, 16, 40)))
    with jax.set_mesh(mesh_of(config)):

        @jax.jit
        def run(x, w, grad_y):
            out = jax.typeof(grad_y).sharding.spec
            y, back = jax.vjp(
                lambda x, w: product("MI,IO->MO", x, w, out, AxisRules(), BFLOAT16), x, w
            )
            return y, *back(grad_y)

        found = run(*(np.float32(a) for a in (x, w, grad_y)))
    pairs = ("bmi,io->bmo", x, w), ("bmo,io->bmi", grad_y, w), ("bmi,bmo->io", x, grad_y)
    for got, (equation, first, second) in zip(found, pairs, strict=True):
        assert got.dtype == jnp.float32
        wanted = np.einsum(equation, first, second)
        bound = 2.01 * ROUNDING * np.einsum(equation, np.abs(first), np.abs(second))
        error = np.abs(got - wanted)
        assert (error <= bound).all() and error.max() > 1e-3
        low = (np.float32(a).astype(jnp.bfloat16).astype(np.float64) for a in (first, second))
        np.testing.assert_allclose(got, np.einsum(equation, *low), rtol=1e-4, atol=1e-4)
