"""The safetensors file format, read and written one tensor at a time.

The library of that name reads. It would write a file from a dictionary of all tensors, as a second
copy of the model in memory, so files are written here:

    8 bytes  length of the header, little-endian
    header   {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
              "__metadata__": {}}
    data     the tensors, row-major, little-endian
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

from jaxgpt.system.errors import BadInput, as_bad_input

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
MOST_AXES = 8


class SafetensorsFile:
    """One file's tensors: `shapes` and `dtypes` by name, `read(name)` for the values."""

    def __init__(self, file: Path):
        with as_bad_input(lambda e: f"{file} is not a safetensors file, or damaged: {e}"):
            # `pread`: a mapped file that is cut short meanwhile would end the process
            opened = safe_open(file, framework="numpy", backend="pread")
            headers = {name: opened.get_slice(name) for name in opened.keys()}
        self.size, self.read = file.stat().st_size, opened.get_tensor
        self.shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
        self.dtypes = {}
        for name, header in headers.items():
            dtype, shape = header.get_dtype(), self.shapes[name]
            if dtype not in DTYPES or len(shape) > MOST_AXES:
                raise BadInput(f"{file}: tensor {name} has dtype {dtype} and shape {shape}")
            self.dtypes[name] = DTYPES[dtype]


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
