"""Matrices in few bits: a small code for each weight, and a scale for each group of inputs.

A projection [64, 3] (inputs, outputs) as int4 in groups of 32:

    values uint8 [32, 3]    byte [i, o] holds the codes of w[2i, o], low bits, and w[2i + 1, o]
    scales bfloat16 [2, 3]  w[i, o] = (code[i, o] - 8) * scales[i // 32, o]

`axis` is that of the inputs: -2 of a projection [I, O], -1 of a table [V, D]. The last group may be
shorter, and the last byte half empty.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

# 16 quantiles of N(0, 1), one of them 0, scaled to [-1, 1] (QLoRA, arXiv:2305.14314, appendix E)
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
# What each code stands for, in scales; the largest weight of a group is the last
LEVELS = {"int4": np.arange(-8, 8, dtype=np.float32), "nf4": NF4}
LARGEST = {"int8": 127, "int4": 7, "nf4": 1}
# Where the levels are whole numbers: the lowest, the highest and the code of 0
WHOLE = {"int8": (-127, 127, 0), "int4": (-8, 7, 8)}


@dataclasses.dataclass(frozen=True)
class Format:
    """How a matrix is stored: `kind` is a key of `LARGEST`, `group` the number of inputs that share
    a scale (0: all inputs of an output)."""

    kind: str
    group: int = 0

    @property
    def per_byte(self) -> int:
        """How many weights a byte holds."""
        return 1 if self.kind == "int8" else 2

    @property
    def dtype(self):
        """The dtype of the values."""
        return jnp.dtype(jnp.int8 if self.kind == "int8" else jnp.uint8)

    @property
    def scale_dtype(self):
        """The dtype of the scales: bfloat16, or float32 where they are few."""
        return jnp.dtype(jnp.bfloat16 if self.group else jnp.float32)

    def sizes(self, inputs: int) -> tuple[int, int]:
        """Returns how many values and how many scales an output of so many inputs has."""
        return -(-inputs // self.per_byte), -(-inputs // self.group) if self.group else 1

    def is_divisible(self, inputs: int, devices: int) -> bool:
        """Says whether the inputs can be split over so many devices, each with groups of its
        own."""
        return devices == 1 or (self.group > 0 and inputs % (devices * self.group) == 0)

    def scales_of(self, w: np.ndarray, axis: int) -> np.ndarray:
        """Returns the smallest scales at which no weight is clipped, as they are stored."""
        largest = np.max(np.abs(self._groups(_last(w, axis))), axis=-1)
        # a product, as XLA makes one of a division by a constant (`parameters.fake`)
        wanted = largest * np.float32(1 / LARGEST[self.kind])
        scales = wanted.astype(self.scale_dtype)
        above = np.nextafter(scales, np.array(np.inf, scales.dtype))
        scales = np.where(scales.astype(np.float32) < wanted, above, scales)
        return np.moveaxis(scales, -1, axis)

    def quantise(
        self, w: np.ndarray, axis: int, scales: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the (values, scales) of w [..., I, O] or [..., V, D]: the code of each weight is
        the nearest. `scales` default to `scales_of(w, axis)`."""
        scales = self.scales_of(w, axis) if scales is None else scales
        codes, _ = self.rounded(self._groups(_last(w, axis)), _last(scales, axis)[..., None])
        codes = codes.reshape(*codes.shape[:-2], -1)[..., : w.shape[axis]]
        return self.pack(np.moveaxis(codes, -1, axis), axis), scales

    def rounded(self, w: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the nearest codes and what they stand for, of weights and the scale of each."""
        scales = np.asarray(scales, np.float32)
        ratio = w / np.where(scales == 0, 1, scales)
        if self.kind in WHOLE:
            low, high, zero = WHOLE[self.kind]
            whole = np.clip(np.rint(ratio), low, high)
            return (whole + zero).astype(self.dtype), whole * scales
        levels = LEVELS[self.kind]
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, ratio).astype(np.uint8)
        return codes, levels[codes] * scales

    def pack(self, codes: np.ndarray, axis: int) -> np.ndarray:
        """Returns the values that hold these codes."""
        if self.per_byte == 1:
            return codes
        codes = np.moveaxis(codes, axis, 0)
        codes = np.concatenate([codes, np.zeros_like(codes[: len(codes) % 2])])
        return np.moveaxis(codes[0::2] | codes[1::2] << 4, 0, axis)

    def _groups(self, w: np.ndarray) -> np.ndarray:
        """Returns w [..., I] as [..., groups, inputs], the last group filled up with zeros."""
        group = self.group or w.shape[-1]
        w = np.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, -w.shape[-1] % group)])
        return w.reshape(*w.shape[:-1], -1, group)

    def dequantise(
        self, values: Integer[Array, "..."], scales: Float[Array, "..."], axis: int, inputs, dtype
    ) -> Float[Array, "..."]:
        """Returns the weights in `dtype`, so many `inputs` along `axis`."""
        if self.kind == "int8":
            weights = values.astype(dtype)
        else:
            codes = _joined(jnp.stack([values & 15, values >> 4], axis=axis), axis, inputs)
            weights = self._levels_of(codes, dtype)
        scales = scales.astype(dtype)
        if self.group:
            apart = jnp.expand_dims(scales, axis)
            shape = list(apart.shape)
            shape[axis] = self.group
            scales = _joined(jnp.broadcast_to(apart, shape), axis, inputs)
        return weights * scales

    def _levels_of(self, codes: Integer[Array, "*S"], dtype) -> Float[Array, "*S"]:
        """Returns what int4's or NF4's codes stand for, in scales."""
        if self.kind == "int4":
            return codes.astype(dtype) - 8
        levels = [jnp.asarray(level, dtype) for level in LEVELS[self.kind]]
        for bit in range(4):  # selections stay in registers, where a look-up reads memory
            is_one = (codes >> bit) & 1 == 1
            levels = [
                jnp.where(is_one, *pair) for pair in zip(levels[1::2], levels[::2], strict=True)
            ]
        return levels[0]


def _last(w: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(np.asarray(w, np.float32), axis, -1)


def _joined(a: jax.Array, axis: int, length: int) -> jax.Array:
    """Returns `a` with `axis` and the one before it joined; the first `length` are kept."""
    at, spec = a.ndim + axis, jax.typeof(a).sharding.spec
    shape = (*a.shape[: at - 1], a.shape[at - 1] * a.shape[at], *a.shape[at + 1 :])
    a = jax.lax.reshape(a, shape, out_sharding=jax.P(*spec[:at], *spec[at + 1 :]))
    return a if shape[at - 1] == length else jax.lax.slice_in_dim(a, 0, length, axis=at - 1)
