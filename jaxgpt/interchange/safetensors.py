"""The safetensors file format: a JSON header and raw tensors, read and written one by one.

    8 bytes  length of the header, little-endian
    header   {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
              "__metadata__": {}}
    data     the tensors, row-major, little-endian

The library of that name writes a file from a dictionary of all tensors. Here tensors are read and
written one by one, so that no second copy of a model is ever in memory.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import check_json, parse_json

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100 << 20
MOST_AXES = 8
ENTRY = {"dtype": str, "shape": [int], "data_offsets": (int, int)}


class SafetensorsFile:
    """One file's tensors: `shapes` and `dtypes` by name, `read` for the values."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self.entries, self.start = _header(file)
        except OSError as e:
            raise BadInput(f"{file} cannot be read: {e}") from e
        except ValueError as e:
            raise BadInput(f"{file} is not a safetensors file, or damaged: {e}") from e
        self.size = file.stat().st_size
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self.entries.items()}
        self.dtypes = {name: DTYPES[entry["dtype"]] for name, entry in self.entries.items()}

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, read from the file."""
        begin, _ = self.entries[name]["data_offsets"]
        count = math.prod(self.shapes[name])
        with open(self.file, "rb") as stream:
            stream.seek(self.start + begin)
            values = np.fromfile(stream, self.dtypes[name], count)
        return values.reshape(self.shapes[name])


def _header(file: Path) -> tuple[dict, int]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ValueError(f"its header claims {length} of {size} bytes")
        entries = parse_json(stream.read(length), {str: dict})
    entries.pop("__metadata__", None)
    check_json(entries, {str: ENTRY})
    end = 0  # tensors follow each other without overlaps or gaps
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"tensor {name} has the unknown dtype {entry['dtype']}")
        if len(entry["shape"]) > MOST_AXES or min(entry["shape"], default=0) < 0:
            raise ValueError(f"tensor {name} has the shape {entry['shape']}")
        wanted = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        begin, previous, end = entry["data_offsets"][0], end, entry["data_offsets"][1]
        if end - begin != wanted or end > size - 8 - length:
            raise ValueError(f"tensor {name} does not lie within the file (cut short?)")
        if begin != previous:
            raise ValueError(f"tensor {name} begins at {begin}, the one before ends at {previous}")
    if end != size - 8 - length:
        raise ValueError(f"{size - 8 - length - end} bytes at its end belong to no tensor")
    return entries, 8 + length


def write_safetensors(
    file: Path, shapes: dict[str, tuple], dtype: np.dtype, read: Callable[[str], np.ndarray]
) -> None:
    """Writes each tensor that `read(name)` returns as `dtype`, one at a time."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    header += b" " * (-len(header) % 8)
    with open(file, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            values = np.ascontiguousarray(read(name).astype(dtype, copy=False))
            if values.shape != tuple(shape):
                raise ValueError(f"tensor {name} has shape {values.shape}, not {shape}")
            values.tofile(stream)
