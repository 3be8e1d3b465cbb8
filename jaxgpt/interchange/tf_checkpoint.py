"""TensorFlow's checkpoint format, as far as OpenAI's GPT-2 release needs it, without TensorFlow.

`model.ckpt.index` is a LevelDB table from variable names to protocol buffers with the variable's
dtype, shape and offset in `model.ckpt.data-00000-of-00001` (tensorflow/core/util/tensor_bundle).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxgpt.system.errors import BadInput

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
FLOAT = 1  # DT_FLOAT
LONGEST_INDEX, LONGEST_NAME = 100 << 20, 1000


class TfCheckpoint:
    """A checkpoint's float32 variables: `shapes` and `dtypes` by name, `read` for the values."""

    def __init__(self, folder: Path):
        index, self.data = folder / "model.ckpt.index", folder / "model.ckpt.data-00000-of-00001"
        self.offsets: dict[str, int] = {}
        self.shapes: dict[str, tuple] = {}
        try:
            self.size = self.data.stat().st_size
            if index.stat().st_size > LONGEST_INDEX:
                raise ValueError(f"its index has more than {LONGEST_INDEX} bytes")
            for key, value in _table(index.read_bytes()):
                if key:  # the empty key holds the header
                    self._add(key.decode(), dict(_fields(value)))
        except OSError as e:
            raise BadInput(f"the TensorFlow checkpoint in {folder} cannot be read: {e}") from e
        except (ValueError, IndexError, KeyError, TypeError, DecodeError) as e:
            raise BadInput(f"the TensorFlow checkpoint in {folder} is damaged: {e}") from e
        self.dtypes = dict.fromkeys(self.shapes, np.dtype("<f4"))

    def _add(self, name: str, entry: dict) -> None:
        if entry.get(1) != FLOAT:
            return  # the step and other counters
        dims = [value for number, value in _fields(entry.get(2, b"")) if number == 2]
        shape = [dict(_fields(dim)).get(1, 0) for dim in dims]
        if len(shape) == 3 and shape[0] == 1:
            shape = shape[1:]  # kernels are convolutions of width 1
        offset, length = entry.get(4, 0), entry.get(5, 0)
        if length != 4 * math.prod(shape) or offset + length > self.size:
            raise ValueError(f"variable {name} does not lie within the data file")
        self.offsets[name], self.shapes[name] = offset, tuple(shape)

    def read(self, name: str) -> np.ndarray:
        """Returns a variable, read from the file."""
        count = math.prod(self.shapes[name])
        values = np.fromfile(self.data, "<f4", count, offset=self.offsets[name])
        return values.reshape(self.shapes[name])


def _table(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the (key, value) pairs of a LevelDB table."""
    if len(raw) < FOOTER_BYTES or int.from_bytes(raw[-8:], "little") != MAGIC:
        raise ValueError("the index is not a table")
    at = len(raw) - FOOTER_BYTES
    handle = []  # of the meta index, then of the index: an offset and a size each
    for _ in range(4):
        number, at = _varint(raw, at)
        handle.append(number)
    previous = 0  # where the last block ended: overlapping blocks could be read without end
    for _, value in _block(raw, *handle[2:]):
        offset, at = _varint(value, 0)
        size, _ = _varint(value, at)
        if offset < previous:
            raise ValueError("the index's blocks overlap")
        previous = offset + size
        yield from _block(raw, offset, size)


def _block(raw: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    if raw[offset + size] != 0:
        raise ValueError("the index is compressed")
    block = raw[offset : offset + size]
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key = len(block) - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared + unshared > LONGEST_NAME:
            raise ValueError("a name is too long")
        key = key[:shared] + block[at : at + unshared]
        yield key, block[at + unshared : at + unshared + length]
        at += unshared + length


def _fields(raw: bytes) -> list[tuple[int, Any]]:
    """Returns the (field number, value) pairs of a protocol buffer."""
    return [(f.field_number, f.data) for f in UnknownFieldSet(Empty.FromString(raw))]


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Returns the number that begins at `at`, of at most 64 bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            break
        byte = raw[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("a number is cut short or too long")
