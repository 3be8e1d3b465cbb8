"""`pytorch_model.bin` without torch and without running anything it contains.

The file is a zip of a pickle that describes the tensors and one raw file per storage. A pickle may
name any function to call; ours knows the few that tensors need and refuses the rest unopened.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxgpt.config import BadInput

STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "DoubleStorage": np.dtype("<f8"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple
    stride: tuple


def _tensor(storage, offset, size, stride, *_) -> _Tensor:
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _parameter(data, *_):
    return data


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
} | {("torch", name): dtype for name, dtype in STORAGES.items()}


class _Refused(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise _Refused(f"{module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, saved):
        kind, dtype, key, _, count = saved
        if kind != "storage" or not isinstance(dtype, np.dtype) or not str(key).isalnum():
            raise ValueError(f"an unknown reference {saved!r}")
        return _Storage(dtype, str(key), int(count))


class TorchFile:
    """The tensors of a state dict: `shapes` and `dtypes` by name, `read` for the values."""

    def __init__(self, file: Path):
        self.file = file
        try:
            with zipfile.ZipFile(file) as archive:
                (index,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
                self.folder = index.removesuffix("data.pkl")
                with archive.open(index) as stream:
                    state = _Unpickler(stream).load()
                sizes = {info.filename: info.file_size for info in archive.infolist()}
        except _Refused as e:
            raise BadInput(f"{file} wants to run {e}: no state of tensors does; refused") from e
        except zipfile.BadZipFile as e:
            raise BadInput(
                f"{file} is not a zip as torch writes since 1.6, or damaged ({e}); convert it to"
                " safetensors"
            ) from e
        except Exception as e:  # a pickle can fail in any way it likes
            raise BadInput(f"{file} holds no state of tensors: {type(e).__name__}: {e}") from e
        if not isinstance(state, dict) or not all(isinstance(t, _Tensor) for t in state.values()):
            raise BadInput(f"{file} holds no state of tensors: something else is in it")
        self.tensors: dict[str, _Tensor] = dict(state)
        for name, tensor in self.tensors.items():
            self._check(name, tensor, sizes)
        self.shapes = {name: t.shape for name, t in self.tensors.items()}
        self.dtypes = {name: t.storage.dtype for name, t in self.tensors.items()}

    def _check(self, name: str, tensor: _Tensor, sizes: dict[str, int]) -> None:
        storage, steps = tensor.storage, zip(tensor.shape, tensor.stride, strict=True)
        last = tensor.offset + sum((n - 1) * step for n, step in steps)
        whole = [tensor.offset, *tensor.shape, *tensor.stride]
        if not all(isinstance(n, int) and n >= 0 for n in whole) or last >= storage.count:
            raise BadInput(f"{self.file}: tensor {name} does not lie within its storage")
        if sizes.get(f"{self.folder}data/{storage.key}") != storage.count * storage.dtype.itemsize:
            raise BadInput(f"{self.file}: the data of tensor {name} is missing or cut short")

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, read from the file now."""
        tensor = self.tensors[name]
        dtype = tensor.storage.dtype
        with zipfile.ZipFile(self.file) as archive:
            raw = archive.read(f"{self.folder}data/{tensor.storage.key}")
        values = np.frombuffer(raw, dtype)[tensor.offset :]
        if tensor.stride == _row_major(tensor.shape):
            return values[: math.prod(tensor.shape)].reshape(tensor.shape)
        strides = [step * dtype.itemsize for step in tensor.stride]
        return np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)


def _row_major(shape: tuple) -> tuple:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
