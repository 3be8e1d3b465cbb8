"""TensorFlow's checkpoint format, as far as OpenAI's GPT-2 release needs it, without TensorFlow.

`model.ckpt.index` is a LevelDB table from variable names to protocol buffers that say where in
`model.ckpt.data-00000-of-00001` a variable lies (tensorflow/core/util/tensor_bundle).
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxgpt.interchange.protobuf import message, varint
from jaxgpt.system.errors import BadInput

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
FLOAT = 1  # DT_FLOAT
LONGEST_INDEX, LONGEST_NAME = 100 << 20, 1000


class TfCheckpoint:
    """A checkpoint's float32 variables: `shapes` and `dtypes` by name, `read` for the values."""

    def __init__(self, folder: Path):
        index, self.data = folder / "model.ckpt.index", folder / "model.ckpt.data-00000-of-00001"
        self.places: dict[str, int] = {}
        self.shapes: dict[str, tuple] = {}
        try:
            self.size = size = self.data.stat().st_size
            if index.stat().st_size > LONGEST_INDEX:
                raise ValueError(f"its index has more than {LONGEST_INDEX} bytes")
            for key, value in _table(index.read_bytes()):
                if key:  # the empty key holds the header
                    self._add(key.decode(), dict(message(value)), size)
        except OSError as e:
            raise BadInput(f"the TensorFlow checkpoint in {folder} cannot be read: {e}") from e
        except (ValueError, IndexError, KeyError, TypeError) as e:
            raise BadInput(f"the TensorFlow checkpoint in {folder} is damaged: {e}") from e
        self.dtypes = dict.fromkeys(self.shapes, np.dtype("<f4"))

    def _add(self, name: str, entry: dict, data_size: int) -> None:
        if entry.get(1) != FLOAT:
            return  # counters and the like
        shape = [
            dict(message(dim)).get(1, 0)
            for number, dim in message(entry.get(2, b""))
            if number == 2
        ]
        offset, length = entry.get(4, 0), entry.get(5, 0)
        if length != 4 * math.prod(shape) or offset + length > data_size:
            raise ValueError(f"variable {name} does not lie within the data file")
        self.places[name], self.shapes[name] = offset, tuple(shape)

    def read(self, name: str) -> np.ndarray:
        """Returns a variable, read from the file now."""
        count = math.prod(self.shapes[name])
        values = np.fromfile(self.data, "<f4", count, offset=self.places[name])
        return values.reshape(self.shapes[name])


def _table(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the (key, value) pairs of a LevelDB table."""
    if len(raw) < FOOTER_BYTES or int.from_bytes(raw[-8:], "little") != MAGIC:
        raise ValueError("the index is not a table")
    at = len(raw) - FOOTER_BYTES
    handle = []  # of the meta index, then of the index: an offset and a size each
    for _ in range(4):
        number, at = varint(raw, at)
        handle.append(number)
    previous = 0  # the end of the block before: none is read twice
    for _, value in _block(raw, *handle[2:]):
        offset, place = varint(value, 0)
        size, _ = varint(value, place)
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
        shared, at = varint(block, at)
        unshared, at = varint(block, at)
        length, at = varint(block, at)
        if shared + unshared > LONGEST_NAME:
            raise ValueError("a name is too long")
        key = key[:shared] + block[at : at + unshared]
        yield key, block[at + unshared : at + unshared + length]
        at += unshared + length
