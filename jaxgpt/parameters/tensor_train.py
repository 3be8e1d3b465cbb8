"""Embeddings as a tensor train (arXiv:1901.10787, section 3): a few small cores for a large table.

The numbers of a token and of a column are written with three digits each, i = (i1, i2, i3) and
j = (j1, j2, j3), and a table [V, D] is a product of three matrices picked by the digits:

    table[i, j] = A[i1, :, j1, :] B[i2, :, j2, :] C[i3, :, j3, :]

of shapes [1, R1] [R1, R2] [R2, 1]. Cores are stored as [digits of V, R before, digits of D, R
after], whole on every device. Of 50,304 x 768 with ranks of 64 the cores hold 1.7% of the table.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxgpt.config.schema import MESH_AXES, REPLICAS
from jaxgpt.ops.cross_entropy import Reader

NAMES = ("core_0", "core_1", "core_2")
SPLIT = tuple(name for name in MESH_AXES if name not in REPLICAS)  # axes that cut rows or batch


def digits(n: int) -> tuple[int, int, int]:
    """Returns three factors of n of the least sum, the smallest in the middle."""
    found = (
        (a, b, n // a // b)
        for a in range(1, round(n ** (1 / 3)) + 1)
        if n % a == 0
        for b in range(a, math.isqrt(n // a) + 1)
        if n // a % b == 0
    )
    least, middle, most = min(found, key=sum)
    return middle, least, most


class Modes(NamedTuple):
    """How many values each digit has, of the tokens and of the columns."""

    rows: tuple[int, int, int]
    columns: tuple[int, int, int]

    @classmethod
    def of(cls, shape: tuple[int, int]) -> "Modes":
        """Returns the modes of a table [V, D]."""
        return cls(*map(digits, shape))

    def ranks(self, rank: int) -> tuple[int, int]:
        """Returns the two ranks, `rank` at most: more than what lies on either side serves none."""
        a, b, c = (v * d for v, d in zip(*self, strict=True))
        first = min(rank, a, b * c)
        return first, min(rank, first * b, c)

    def shapes(self, rank: int) -> list[tuple[int, int, int, int]]:
        """Returns the shapes of the cores."""
        first, second = self.ranks(rank)
        around = (1, first), (first, second), (second, 1)
        return [
            (v, before, d, after)
            for v, d, (before, after) in zip(self.rows, self.columns, around, strict=True)
        ]


def decompose(table: Float[np.ndarray, "V D"], rank: int) -> list[Float[np.ndarray, "v R d S"]]:
    """Returns the cores by TT-SVD (Oseledets 2011, algorithm 1): the squared error is at most the
    sum of the squared singular values that are cut off. All cores are of one norm."""
    modes = Modes.of(table.shape)
    rest = np.asarray(table, np.float64).reshape(*modes.rows, *modes.columns)
    rest = rest.transpose(0, 3, 1, 4, 2, 5).reshape(1, -1)
    cores = []
    for v, before, d, after in modes.shapes(rank)[:-1]:
        u, s, vt = np.linalg.svd(rest.reshape(before * v * d, -1), full_matrices=False)
        cores.append(u[:, :after].reshape(before, v, d, after).transpose(1, 0, 2, 3))
        rest = s[:after, None] * vt[:after]
    v, before, d, _ = modes.shapes(rank)[-1]
    cores.append(rest.reshape(before, v, d, 1).transpose(1, 0, 2, 3))
    norms = [max(np.linalg.norm(core), 1e-30) for core in cores]
    mean = math.prod(norms) ** (1 / 3)
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


def rows_of(cores: tuple, ids: Int[Array, "*I"]) -> Float[Array, "*I D"]:
    """Returns the rows of these tokens; every core is whole."""
    picked = []
    for core in reversed(cores):
        ids, digit = ids // core.shape[0], ids % core.shape[0]
        spec = P(*jax.typeof(digit).sharding.spec, None, None, None)
        picked.append(core.at[digit].get(out_sharding=spec))
    c, b, a = picked
    row = jnp.einsum("...rds,...set->...rdet", a, b)
    row = jnp.einsum("...rdes,...sft->...rdeft", row, c)
    return row.reshape(*row.shape[: ids.ndim], -1)


class TensorTrain(nnx.Module):
    """The parameters of a table."""

    def __init__(self, cores: list):
        for name, core in zip(NAMES, cores, strict=True):
            setattr(self, name, nnx.Param(core))

    @property
    def cores(self) -> tuple[jax.Array, ...]:
        """The cores, in order."""
        return tuple(getattr(self, name)[...] for name in NAMES)


@dataclasses.dataclass(frozen=True)
class TensorTrainTable:
    """A table [V, D] of which rows are looked up, and which is multiplied as the head, by its
    cores."""

    shape: tuple[int, int]
    rank: int
    dtype: str

    def make(self, rngs: nnx.Rngs, spec: P, std: float) -> TensorTrain:
        """Returns cores drawn such that the table's weights have this std."""
        modes = Modes.of(self.shape)
        each = (std / math.prod(modes.ranks(self.rank)) ** 0.5) ** (1 / 3)
        draw = jax.nn.initializers.normal(each)
        shapes = modes.shapes(self.rank)
        return TensorTrain(
            [
                draw(rngs.params(), s, jnp.dtype(self.dtype), out_sharding=P(*[None] * 4))
                for s in shapes
            ]
        )

    def lookup(self, table: TensorTrain, rows: Int[Array, "B T"], dtype, out: P):
        """Returns the rows of these numbers, [B, T, D], of sharding `out`."""
        cores = tuple(core.astype(dtype) for core in table.cores)
        return jax.sharding.reshard(rows_of(cores, rows), out)

    def whole(self, table: TensorTrain, dtype) -> tuple[jax.Array, ...]:
        """Returns what `rows` reads: float32 holding values of `dtype`."""
        return tuple(core.astype(dtype).astype(jnp.float32) for core in table.cores)

    def rows(self, whole: tuple, dtype) -> Float[Array, "V D"]:
        """Returns the whole table, for logits that are whole too, and larger."""
        return rows_of(tuple(core.astype(dtype) for core in whole), jnp.arange(self.shape[0]))

    def few_logits(self, x: Float[Array, "B D"], whole: tuple, out: P) -> Float[Array, "B V"]:
        """Returns x times the table in float32, of sharding `out`: a core at a time."""
        a, b, c = whole
        d = tuple(core.shape[2] for core in whole)
        y = jax.sharding.reshard(x, P(None, None)).astype(jnp.float32).reshape(-1, *d)
        y = jnp.einsum("Bdef,urds->Busef", y, a)
        y = jnp.einsum("Busef,vset->Buvtf", y, b)
        y = jnp.einsum("Buvtf,wtfz->Buvw", y, c)
        return jax.sharding.reshard(y.reshape(len(x), -1), out)

    def mean_row(self, table: TensorTrain, count: int) -> Float[Array, "D"]:
        """Returns the mean of the first `count` rows in float32."""
        cores = tuple(core.astype(jnp.float32) for core in table.cores)
        return jnp.mean(rows_of(cores, jnp.arange(count)), axis=0)

    def parts(self, table: TensorTrain) -> tuple[tuple, Reader]:
        """Returns what `ops.cross_entropy` reads part by part, and how: rows of a part are made of
        the cores when its turn comes, and their gradient becomes the cores'."""
        return table.cores, Reader((), _read, _gradient, self._size, self._cut, _summed)

    def _size(self, cores: tuple) -> int:
        return self.shape[0] // jax.lax.axis_size("tensor")

    def _cut(self, cores: tuple, count: int) -> dict:
        size = self._size(cores)
        ids = jax.lax.axis_index("tensor") * size + jnp.arange(size)
        repeated = tuple(jnp.broadcast_to(core, (count, *core.shape)) for core in cores)
        return {"cores": repeated, "ids": ids.reshape(count, -1)}


def _read(part: dict, dtype, torus) -> Float[Array, "v D"]:
    return rows_of(tuple(core.astype(dtype) for core in part["cores"]), part["ids"])


def _gradient(grad, part: dict, torus) -> tuple:
    cores = tuple(core.astype(grad.dtype) for core in part["cores"])
    return jax.vjp(lambda cores: rows_of(cores, part["ids"]), cores)[1](grad)[0]


def _summed(gradients: tuple) -> tuple:
    """Of every part, and of the devices that share the rows of a batch or have other tokens."""
    return jax.tree.map(lambda g: jax.lax.psum(jnp.sum(g, axis=0), SPLIT)[None], gradients)
