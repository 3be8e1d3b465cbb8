"""`compute.dtype=bfloat16` on one CPU: products in bfloat16, the rest in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.objectives.language import token_losses
from jaxgpt.parallel.fsdp import product
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parameters.bfloat16 import BFLOAT16
from jaxgpt.training.setup import model_spec
from tests.conftest import mesh_of, random_batch, tiny_config

ROUNDING = 2**-8  # of a factor, relative: half a unit in the last of bfloat16's 8 bits


def test_one_cpu_multiplies_in_bfloat16_and_computes_the_rest_in_float32():
    """In XLA's own program the three products of each of six projections in two layers, and of the
    head, have bfloat16 factors, and the others float32 ones: it converts none. Loss and gradients
    are float32's but for rounding."""
    found = {}
    for dtype, scan in (("float32", "true"), ("bfloat16", "false")):
        config = tiny_config(compute={"dtype": dtype, "scan_layers": scan})
        with jax.set_mesh(mesh := mesh_of(config)):
            spec = model_spec(config, mesh)
            params = jax.jit(spec.init)(jax.random.key(0))
            micro = {name: jnp.asarray(a[0]) for name, a in random_batch(config).items()}

            def loss_of(params, spec=spec, micro=micro):
                return jnp.mean(token_losses(spec.bind(params), micro, None)[0])

            compiled = jax.jit(jax.value_and_grad(loss_of)).lower(params).compile()
            found[dtype] = compiled(params)
    products = [part for part in compiled.as_text().split("\n}") if " dot(" in part]
    factors = [set(re.findall(r"= (f32|bf16)\S+ parameter", part)) for part in products]
    assert factors.count({"bf16"}) == 2 * 6 * 3 + 3 and {"bf16", "f32"} not in factors
    (loss, grads), (low_loss, low_grads) = found["float32"], found["bfloat16"]
    assert 0 < abs(loss - low_loss) < 1e-3

    def compare(want, got):
        assert got.dtype == jnp.float32
        close = 4 * ROUNDING * np.linalg.norm(want) + 1e-9  # keys' biases have no gradient
        assert 0 < np.linalg.norm(got - want) < close

    jax.tree.map(compare, grads, low_grads)


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
