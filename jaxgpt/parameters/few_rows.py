"""Products with matrices in few bits, on a CPU.

Left to itself XLA's CPU backend makes floats of all matrices of a program first, in new memory.

Decoding one row reads every weight once, so that the weights' bytes are the limit. In `multiply` a
block of inputs is summed in one elementwise expression over the outputs: LLVM loads the codes of 8
or 16 outputs, converts them in registers and multiplies them, all in float32.

For more rows `multiply_panels` makes floats of a panel of outputs right in front of its product:
they stay in the processor's cache, and the next panel's take their place.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxgpt.parameters.quantised import Format

MOST_ROWS = 1  # each row is a program of its own, which takes its time to compile
BLOCK = 32  # inputs summed in one expression: a register holds x for each
SMALLEST_BLOCK = 8
PANEL = 4096  # outputs whose weights are floats at a time: 12 MB at GPT-2's width
ZERO = {"int8": 0, "int4": 8}  # the code that stands for 0; NF4's levels have none


def block_size(fmt: Format, inputs: int) -> int:
    """Returns how many inputs are summed at a time, 0 where `multiply` does not apply."""
    if fmt.kind not in ZERO:
        return 0
    if fmt.group:
        whole = inputs % fmt.group == 0 and fmt.group % fmt.per_byte == 0
        return fmt.group if whole else 0
    sizes = range(BLOCK, SMALLEST_BLOCK - 1, -1)
    return next((n for n in sizes if inputs % n == 0 and n % fmt.per_byte == 0), 0)


def multiply(
    fmt: Format, x: Float[Array, "M I"], values: Integer[Array, "_ O"], scales: Float[Array, "_ O"]
) -> Float[Array, "M O"]:
    """Returns x w in x's dtype, of a matrix w whose inputs come first; see
    `parameters.quantised`."""
    rows = [_multiply_row(fmt, row, values, scales) for row in x.astype(jnp.float32)]
    return jnp.stack(rows).astype(x.dtype)


def _multiply_row(fmt: Format, x, values, scales) -> Float[Array, "O"]:
    inputs, outputs = x.shape[0], values.shape[-1]
    size = block_size(fmt, inputs)
    x = x.reshape(inputs // size, size, 1)
    values = values.reshape(len(x), size // fmt.per_byte, outputs)
    sums = jax.lax.optimization_barrier(-ZERO[fmt.kind] * jnp.sum(x, axis=1))
    for k in range(values.shape[1]):
        byte = values[:, k].astype(jnp.int32)
        codes = (byte,) if fmt.per_byte == 1 else (byte & 15, byte >> 4)
        for i, code in enumerate(codes):
            sums = sums + code.astype(jnp.float32) * x[:, fmt.per_byte * k + i]
    scales = scales.astype(jnp.float32)
    # Without the barrier XLA makes one reduction of it all, which it does not vectorise
    sums = jax.lax.optimization_barrier(sums * scales if fmt.group else sums)
    y = jnp.ones(len(x)) @ sums
    return y if fmt.group else y * scales[0]


def multiply_panels(
    as_floats: Callable, x: Float[Array, "B T I"], whole: dict[str, jax.Array]
) -> Float[Array, "B T O"]:
    """Returns as_floats(x, **whole), the product of x and a matrix whose inputs come first, a panel
    of outputs after the other."""
    # Neither are floats made in front of a loop over tokens
    x, whole = jax.lax.optimization_barrier((x, whole))
    products, known = [], x
    for start in range(0, whole["values"].shape[-1], PANEL):
        part = {name: a[..., start : start + PANEL] for name, a in whole.items()}
        part["scales"] *= _one_after(known).astype(part["scales"].dtype)
        known = as_floats(x, **part)
        products.append(known)
    return products[0] if len(products) == 1 else jnp.concatenate(products, axis=-1)


def _one_after(x: Float[Array, "B T _"]) -> Float[Array, ""]:
    """Returns 1, which XLA does not know before x is there: nothing times 0 is 1."""
    one = jax.lax.stop_gradient(x)[0, 0, 0]
    return jnp.where(one * 0 == 1, 2.0, 1.0)
