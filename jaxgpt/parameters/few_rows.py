"""Products of a few rows with matrices in few bits, on a CPU.

Decoding reads every weight for a row or two, so that the weights' bytes are the limit. Left to
itself XLA's CPU backend writes the weights out as floats first. Here a block of inputs is summed in
one elementwise expression over the outputs: LLVM loads the codes of 8 or 16 outputs, converts them
in registers and multiplies them, all in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxgpt.parameters.quantised import Format

MOST_ROWS = 1  # each row is a program of its own, which takes its time to compile
BLOCK = 32  # inputs summed in one expression: a register holds x for each
SMALLEST_BLOCK = 8
ZERO = {
    "int8": 0,
    "int4": 8,
}  # the code that stands for 0; NF4's levels need a table, which is slow


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
