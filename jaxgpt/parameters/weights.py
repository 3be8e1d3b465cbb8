"""How a matrix is stored, and what is read of it: projections and tables.

What owns a matrix chooses its storage in its constructor: `kernel_storage` for projections,
`table_storage` for embeddings, head and positions. A storage is a small frozen object that makes
the parameters and computes with them; it holds none itself.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxgpt.config import Config, ShrinkConfig
from jaxgpt.config.validate import LORA_TARGETS, parse_ranks
from jaxgpt.ops.cross_entropy import FLOATS, Reader
from jaxgpt.ops.matmul import PLAIN, Matmul
from jaxgpt.parallel.fsdp import flat, product
from jaxgpt.parallel.replicas import plain
from jaxgpt.parallel.rules import AxisRules, rowwise, weight, whole
from jaxgpt.parallel.specs import names, unsharded
from jaxgpt.parameters import few_rows
from jaxgpt.parameters.bfloat16 import BFLOAT16, BFLOAT16_ROWS
from jaxgpt.parameters.fake import FakeKernel, FakeTable, read, read_kernel
from jaxgpt.parameters.low_precision import FP8, INT8
from jaxgpt.parameters.quantised import Format
from jaxgpt.parameters.tensor_train import NAMES, TensorTrainTable, rows_of

POSITIONS_FORMAT = Format("int8")  # a small table; in four bits it would cost more than it saves
DEFAULT_GROUP = {"int8": 0, "int4": 32, "nf4": 32}  # inputs that share a scale
# Of `compute.matmul`; bfloat16: see `model.spec.resolved`
MATMULS = {"plain": PLAIN, "int8": INT8, "fp8": FP8, "bfloat16": BFLOAT16}
STORED = (*LORA_TARGETS, "head", "positions")  # the matrices that may be in few bits


def normal(rngs: nnx.Rngs, shape: Sequence, spec: P, dtype, std: float) -> nnx.Param:
    """Returns a parameter drawn from N(0, std^2), sharded by `spec` from birth.

    The values depend on the key alone, not on the mesh.
    """
    init = jax.nn.initializers.normal(std)
    return nnx.Param(init(rngs.params(), tuple(shape), dtype, out_sharding=spec))


def constant(value: float, shape: Sequence, spec: P, dtype) -> nnx.Param:
    """Returns a parameter filled with `value`, sharded by `spec` from birth."""
    return nnx.Param(jnp.full(tuple(shape), value, dtype, out_sharding=spec))


class Shape(NamedTuple):
    """A kernel's lengths, how many of its axes (the first) are inputs, and how it is split."""

    sizes: tuple[int, ...]
    inputs: int
    spec: P

    @property
    def matrix(self) -> tuple[int, int]:
        """The numbers of inputs and outputs."""
        return math.prod(self.sizes[: self.inputs]), math.prod(self.sizes[self.inputs :])

    def factors(self, rank: int) -> tuple["Shape", "Shape"]:
        """The shapes of two factors [inputs, R] and [R, outputs]."""
        n, sizes, spec = self.inputs, self.sizes, self.spec
        first = Shape((*sizes[:n], rank), n, P(*spec[:n], None))
        return first, Shape((rank, *sizes[n:]), 1, P(None, *spec[n:]))


class Quantised(nnx.Module):
    """The parameters of a matrix in few bits: see `parameters.quantised`."""

    def __init__(self, fmt: Format, shape: tuple, spec: P, axis: int):
        inputs, mesh = shape[axis], jax.sharding.get_abstract_mesh().shape
        devices = math.prod(mesh[name] for name in names(spec[axis]))
        if not fmt.is_divisible(inputs, devices):
            spec = P(*(None if i == axis % 2 else name for i, name in enumerate(spec)))
        for name, size, dtype in zip(
            ("values", "scales"), fmt.sizes(inputs), (fmt.dtype, fmt.scale_dtype), strict=True
        ):
            sizes = tuple(size if i == axis % 2 else n for i, n in enumerate(shape))
            setattr(self, name, constant(0.0, sizes, spec, dtype))

    def whole(self) -> dict[str, jax.Array]:
        """Returns values and scales, unsharded."""
        arrays = {"values": self.values[...], "scales": self.scales[...]}
        return jax.tree.map(whole, arrays)


@dataclasses.dataclass(frozen=True)
class FloatKernel:
    """A projection's kernel as one array of floats."""

    shape: Shape
    dtype: str
    matmul: Matmul = PLAIN

    def make(self, rngs: nnx.Rngs, std: float) -> nnx.Param:
        """Returns the kernel, drawn from N(0, std^2)."""
        return normal(rngs, self.shape.sizes, self.shape.spec, jnp.dtype(self.dtype), std)

    def product(self, equation: str, x, kernel: nnx.Param, out: P, rules: AxisRules):
        """Returns einsum(equation, x, kernel), see `parallel.fsdp.product`."""
        return product(equation, x, kernel[...], out, rules, self.matmul)

    def dense(self, kernel: nnx.Param, dtype) -> jax.Array:
        """Returns the kernel in its own shape, as floats, unsharded."""
        return weight(kernel, dtype)


@dataclasses.dataclass(frozen=True)
class QuantisedKernel:
    """A projection's kernel in few bits, as one matrix [inputs, outputs]; it is not trained."""

    shape: Shape
    format: Format

    def make(self, rngs: nnx.Rngs, std: float) -> Quantised:
        """Returns a kernel of zeros: it is only ever made to be replaced."""
        spec = P(self.shape.spec[0], self.shape.spec[self.shape.inputs])
        return Quantised(self.format, self.shape.matrix, spec, axis=-2)

    def product(self, equation: str, x, kernel: Quantised, out: P, rules: AxisRules):
        """Returns einsum(equation, x, kernel), [B, T, ...], of sharding `out`; the gradient is that
        of x alone."""
        x, whole, out_rows = flat(x, 2, x.ndim), kernel.whole(), P(*out[:3])

        def as_floats(x, **whole):
            return rowwise("MI,IO->MO", x, self._matrix(**whole, dtype=x.dtype), out_rows)

        y = in_few_bits(self.format, x, whole, out_rows, as_floats)
        return jax.lax.reshape(
            y, (*y.shape[:2], *self.shape.sizes[self.shape.inputs :]), out_sharding=out
        )

    def dense(self, kernel: Quantised, dtype) -> jax.Array:
        """Returns the kernel in its own shape, as floats, unsharded."""
        matrix = self._matrix(**kernel.whole(), dtype=dtype)
        return jax.lax.reshape(matrix, self.shape.sizes, out_sharding=unsharded(self.shape.spec))

    def _matrix(self, values, scales, dtype) -> Float[Array, "I O"]:
        """Returns the weights as one matrix, unsharded, split over `tensor` as x is."""
        inputs, _ = self.shape.matrix
        matrix = self.format.dequantise(values, scales, axis=-2, inputs=inputs, dtype=dtype)
        spec = unsharded(P(self.shape.spec[0], self.shape.spec[self.shape.inputs]))
        return jax.lax.stop_gradient(jax.sharding.reshard(matrix, spec))


def in_few_bits(
    fmt: Format, x: Float[Array, "B T I"], whole: dict[str, jax.Array], out: P, as_floats: Callable
) -> Float[Array, "B T O"]:
    """Returns x w, of sharding `out`, of a matrix w whose inputs come first: as_floats(x, **whole),
    on one CPU by `parameters.few_rows`."""
    whole = jax.lax.stop_gradient(whole)
    names, rows = list(whole), math.prod(x.shape[:-1])

    def elsewhere(x, *arrays):
        # Made again in the backward pass: kept, the floats would be as large as the model
        return jax.checkpoint(as_floats)(x, **dict(zip(names, arrays, strict=True)))

    def in_panels(x, *arrays):
        multiply = jax.checkpoint(partial(few_rows.multiply_panels, as_floats))
        return multiply(x, dict(zip(names, arrays, strict=True)))

    def multiply(x, *arrays):
        y = few_rows.multiply(fmt, x.reshape(rows, -1), **dict(zip(names, arrays, strict=True)))
        return y.reshape(*x.shape[:-1], -1)

    def in_codes(*arrays):
        run = jax.shard_map(multiply, in_specs=(P(),) * len(arrays), out_specs=P())
        return jax.sharding.reshard(run(*jax.sharding.reshard(arrays, P())), out)

    if jax.sharding.get_abstract_mesh().size > 1:
        return elsewhere(x, *whole.values())
    on_cpu = in_panels
    if rows <= few_rows.MOST_ROWS and few_rows.block_size(fmt, x.shape[-1]):
        # With x, or XLA would make floats of the weights once, in front of the loop over tokens
        x, whole = jax.lax.optimization_barrier((x, whole))
        on_cpu = in_codes
    return jax.lax.platform_dependent(x, *whole.values(), cpu=on_cpu, default=elsewhere)


class Factors(nnx.Module):
    """The parameters of the two factors."""

    def __init__(self, factor_in, factor_out):
        self.factor_in, self.factor_out = factor_in, factor_out


@dataclasses.dataclass(frozen=True)
class LowRankKernel:
    """A projection's kernel as the product of two of rank R, which are smaller than it."""

    rank: int
    first: FloatKernel | FakeKernel | QuantisedKernel  # of [inputs, R]
    second: FloatKernel | FakeKernel | QuantisedKernel  # of [R, outputs]

    def make(self, rngs: nnx.Rngs, std: float) -> Factors:
        """Returns two factors drawn such that their product has weights of this std."""
        each = (std / self.rank**0.5) ** 0.5
        return Factors(self.first.make(rngs, each), self.second.make(rngs, each))

    def product(self, equation: str, x, kernel: Factors, out: P, rules: AxisRules):
        """Returns einsum(equation, x, kernel), see `parallel.fsdp.product`, by two products."""
        inputs, result = equation.split("->")
        rows, letters = inputs.split(",")
        into = f"{rows},{letters[: len(rows) - 1]}R->MR"
        low = self.first.product(into, x, kernel.factor_in, P(out[0], out[1], None), rules)
        outof = f"MR,R{result[1:]}->{result}"
        return self.second.product(outof, low, kernel.factor_out, out, rules)

    def dense(self, kernel: Factors) -> jax.Array:
        """Returns the kernel in its own shape, as floats."""
        first, second = self.first.dense(kernel.factor_in), self.second.dense(kernel.factor_out)
        spec = P(*jax.typeof(first).sharding.spec[:-1], *jax.typeof(second).sharding.spec[1:])
        return jnp.tensordot(first, second, 1, out_sharding=spec)


def kernel_storage(config: Config, name: str, shape: Shape):
    """Returns how the projection `name` stores its kernel: a `LowRankKernel` of two or, of one
    piece, a `FloatKernel`, a `FakeKernel` or a `QuantisedKernel`."""
    if rank := parse_ranks(config.shrink.ranks).get(name, 0):
        return LowRankKernel(rank, *(_of_one(config, name, part) for part in shape.factors(rank)))
    return _of_one(config, name, shape)


def _of_one(config: Config, name: str, shape: Shape) -> FloatKernel | FakeKernel | QuantisedKernel:
    if fmt := format_of(config.shrink, name):
        return QuantisedKernel(shape, fmt)
    floats = FloatKernel(shape, config.compute.param_dtype, MATMULS[config.compute.matmul])
    fmt = fake_format_of(config, name)
    return FakeKernel(floats, fmt, config.compute.dtype) if fmt else floats


def format_of(cfg: ShrinkConfig, name: str) -> Format | None:
    """Returns how the matrix `name` is stored, None for floats: a projection by its name, "head"
    (the token embeddings too) or "positions"."""
    if cfg.weights == "float" or name in cfg.keep.split(",") or name not in STORED:
        return None
    return POSITIONS_FORMAT if name == "positions" else Format(cfg.weights, cfg.group)


def fake_format_of(config: Config, name: str) -> Format | None:
    """Returns what the matrix `name` is rounded to while it is trained, None where it is not: see
    `parameters.fake`."""
    kind, cfg = config.compute.fake_quantise, config.shrink
    if kind == "none":
        return None
    group = cfg.group or DEFAULT_GROUP[kind]
    return format_of(dataclasses.replace(cfg, weights=kind, group=group), name)


@dataclasses.dataclass(frozen=True)
class FloatTable:
    """A table [V, D] of floats, whose rows are looked up, and multiplied as the head."""

    shape: tuple[int, int]
    dtype: str
    reader: Reader = FLOATS

    def make(self, rngs: nnx.Rngs, spec: P, std: float) -> nnx.Param:
        """Returns the table, drawn from N(0, std^2)."""
        return normal(rngs, self.shape, spec, jnp.dtype(self.dtype), std)

    def lookup(self, table: nnx.Param, rows: Int[Array, "B T"], dtype, out: P):
        """Returns the rows of these numbers, [B, T, D], of sharding `out`."""
        return table[...].astype(dtype).at[rows].get(out_sharding=out)

    def whole(self, table: nnx.Param, dtype) -> Float[Array, "V D"]:
        """Returns what `rows` reads, unsharded: float32 holding values of `dtype`, so that
        gradients of several readings add up in float32."""
        return weight(table, dtype).astype(jnp.float32)

    def rows(self, whole: Float[Array, "V D"], dtype) -> Float[Array, "V D"]:
        """Returns the table as a product reads it, from `whole`."""
        return whole.astype(dtype)

    def few_logits(self, x: Float[Array, "B D"], whole, out: P) -> Float[Array, "B V"]:
        """Returns x times the table in float32, of sharding `out`. With the table in front XLA's
        CPU backend reads it twice as fast for a few rows, unless it gets to turn the product
        around; elsewhere it is the same."""
        y = jnp.einsum(
            "VD,BD->VB",
            self.rows(whole, x.dtype),
            x,
            out_sharding=P(*reversed(out)),
            preferred_element_type=jnp.float32,
        )
        return (y if x.shape[0] == 1 else jax.lax.optimization_barrier(y)).T

    def mean_row(self, table: nnx.Param, count: int) -> Float[Array, "D"]:
        """Returns the mean of the first `count` rows in float32, unsharded."""
        return _mean_row(plain(table[...]), count)

    def parts(self, table: nnx.Param) -> tuple[jax.Array, Reader]:
        """Returns what `ops.cross_entropy` reads part by part, and how."""
        return table[...], self.reader


@dataclasses.dataclass(frozen=True)
class QuantisedTable:
    """A table [V, D] in few bits, a scale for each row or each group within it; not trained.

    `axis` says where its inputs D are. As a table is stored they come last, so that whole rows are
    looked up; for decoding, which multiplies it for each token, they come first (see `turned`).
    """

    shape: tuple[int, int]
    format: Format
    axis: int = -1

    def make(self, rngs: nnx.Rngs, spec: P, std: float) -> Quantised:
        """Returns a table of zeros: it is only ever made to be replaced."""
        shape, spec = (self.shape, spec) if self.axis == -1 else (self.shape[::-1], spec[::-1])
        return Quantised(self.format, shape, P(*spec), self.axis)

    def lookup(self, table: Quantised, rows: Int[Array, "B T"], dtype, out: P):
        """Returns the rows of these numbers, [B, T, D], of sharding `out`."""

        def pick(a):
            if self.axis == -1:
                return a.at[rows].get(out_sharding=P(*out[:2], None))
            return jnp.moveaxis(a.at[:, rows].get(out_sharding=P(None, *out[:2])), 0, -1)

        picked = jax.tree.map(pick, table.whole())
        return jax.sharding.reshard(self._floats(picked, -1, dtype), out)

    def whole(self, table: Quantised, dtype) -> dict[str, jax.Array]:
        """Returns what `rows` reads, unsharded."""
        return table.whole()

    def rows(self, whole: dict[str, jax.Array], dtype) -> Float[Array, "V D"]:
        """Returns the table as floats."""
        floats = self._floats(whole, self.axis, dtype)
        return floats if self.axis == -1 else floats.T

    def few_logits(self, x: Float[Array, "B D"], whole: dict, out: P) -> Float[Array, "B V"]:
        """Returns x times the table in float32, of sharding `out`."""

        def as_floats(x, **whole):
            rows = self.rows(whole, x.dtype)
            return jnp.einsum("BTD,VD->BTV", x, rows, out_sharding=rows_out)

        rows_out = P(None, *out)
        return in_few_bits(self.format, x[None], whole, rows_out, as_floats)[0].astype(jnp.float32)

    def mean_row(self, table: Quantised, count: int) -> Float[Array, "D"]:
        """Returns the mean of the first `count` rows in float32."""
        return _mean_row(self.rows(table.whole(), jnp.float32), count)

    def parts(self, table: Quantised) -> tuple[dict[str, jax.Array], Reader]:
        """Returns what `ops.cross_entropy` reads part by part, and how."""
        return table.whole(), Reader(("vocab", None), self._read, _no_gradient)

    def _read(self, part: dict, dtype, torus) -> Float[Array, "v D"]:
        return self._floats(part, -1, dtype)

    def _floats(self, whole: dict, axis: int, dtype) -> Float[Array, "..."]:
        floats = self.format.dequantise(**whole, axis=axis, inputs=self.shape[1], dtype=dtype)
        return jax.lax.stop_gradient(floats)


def _mean_row(rows: Float[Array, "V D"], count: int) -> Float[Array, "D"]:
    counted = jnp.arange(rows.shape[0])[:, None] < count
    mean = jnp.sum(jnp.where(counted, rows.astype(jnp.float32), 0), axis=0) / count
    return jax.sharding.reshard(mean, P(None))


def turned(params: dict) -> dict:
    """Returns the parameters with the inputs of quantised tables in front, as decoding reads
    them."""
    tables = {name: params[name] for name in ("tokens", "head") if name in params}
    tables = {name: t for name, t in tables.items() if isinstance(t, dict) and "values" in t}
    return params | jax.tree.map(lambda a: a.T, tables)


def _no_gradient(grad, part, torus) -> None:
    return None


def table_storage(
    config: Config, name: str, shape: tuple, axis: int = -1
) -> FloatTable | FakeTable | QuantisedTable | TensorTrainTable:
    """Returns how the table `name`, "head" or "positions", is stored; `axis`, see
    `QuantisedTable`."""
    if config.shrink.tensor_train and name == "head":
        return TensorTrainTable(shape, config.shrink.tensor_train, config.compute.param_dtype)
    if fmt := format_of(config.shrink, name):
        return QuantisedTable(shape, fmt, axis)
    reader = BFLOAT16_ROWS if config.compute.matmul == "bfloat16" else FLOATS
    floats = FloatTable(shape, config.compute.param_dtype, reader)
    fmt = fake_format_of(config, name)
    return FakeTable(floats, fmt, config.compute.dtype) if fmt else floats


def as_read(config: Config, params: dict, dtype: str) -> tuple[Config, dict]:
    """Returns the same model without `compute.fake_quantise`: its config, and its parameters
    rounded, in `dtype`."""
    if config.compute.fake_quantise == "none":
        return config, params

    def convert(node: dict, owner: str) -> dict:
        return {
            name: convert(child, owner if name == "kernel" else name)
            if isinstance(child, dict)
            else read_one(name, child, owner)
            for name, child in node.items()
        }

    def read_one(name: str, array: jax.Array, owner: str):
        fmt = fake_format_of(config, owner)
        if not fmt or name not in ("kernel", "factor_in", "factor_out", "tokens", "head"):
            return array
        if owner in ("head", "positions"):
            return read(fmt, array, -1, dtype)
        inputs = 2 if owner == "out" and name != "factor_out" else 1
        return jax.vmap(lambda kernel: read_kernel(fmt, kernel, inputs, dtype))(array)

    bare = dataclasses.replace(config.compute, fake_quantise="none")
    return dataclasses.replace(config, compute=bare), convert(params, "head")


def dense(params: dict, cfg: ShrinkConfig, wanted: dict) -> dict:
    """Returns the parameters with every stored matrix as floats, on the host; what else there is
    stays. `wanted` are the shapes of the same model with `ShrinkConfig()`."""

    def convert(node: dict, like: dict, owner: str) -> dict:
        done = {}
        for name, child in node.items():
            want = like.get(name)
            if isinstance(want, dict):
                done[name] = convert(child, want, owner if name == "kernel" else name)
            elif isinstance(child, dict):
                done[name] = _dense_leaf(child, cfg, owner, want.shape)
            else:
                done[name] = child
        return done

    return convert(params, wanted, "head")


def scales_in(params: dict, cfg: ShrinkConfig, wanted: dict) -> dict:
    """Returns the scale of each weight, in the arrays of `dense`; 0 of what is stored as floats."""

    def ones(node: dict) -> dict:
        if "values" not in node:
            return {
                name: ones(child) if isinstance(child, dict) else np.zeros_like(child)
                for name, child in node.items()
            }
        one = 1 if node["values"].dtype == np.int8 else 0x99  # two codes of 9, which stand for 1
        return node | {"values": np.full_like(node["values"], one)}

    return dense(ones(params), cfg, wanted)


def _dense_leaf(stored: dict, cfg: ShrinkConfig, owner: str, shape: tuple) -> np.ndarray:
    """Returns the matrix of a projection or table `owner` in its own shape."""
    if NAMES[0] in stored:
        cores = tuple(jnp.asarray(stored[name]) for name in NAMES)
        return np.asarray(rows_of(cores, jnp.arange(shape[0])))
    if "factor_in" in stored:
        return _product_of_factors(stored, cfg, owner, shape)
    arrays = {name: jnp.asarray(a) for name, a in jax.device_get(stored).items()}
    fmt, is_table = format_of(cfg, owner), owner in ("head", "positions")
    outputs = arrays["values"].shape[-1]
    axis, inputs = (-1, shape[1]) if is_table else (-2, math.prod(shape[1:]) // outputs)
    matrix = fmt.dequantise(**arrays, axis=axis, inputs=inputs, dtype=jnp.float32)
    return np.asarray(matrix).reshape(shape)


def _product_of_factors(stored: dict, cfg: ShrinkConfig, owner: str, shape: tuple) -> np.ndarray:
    layers, rank, last = shape[0], parse_ranks(cfg.ranks)[owner], stored["factor_out"]
    outputs = math.prod((last["values"] if isinstance(last, dict) else last).shape[2:])
    sizes = (layers, math.prod(shape[1:]) // outputs, rank), (layers, rank, outputs)
    first, second = (
        _dense_leaf(part, cfg, owner, size) if isinstance(part, dict) else part
        for part, size in zip((stored["factor_in"], last), sizes, strict=True)
    )
    first, second = (np.asarray(a, np.float32) for a in (first, second))
    return (first.reshape(sizes[0]) @ second.reshape(sizes[1])).reshape(shape)
