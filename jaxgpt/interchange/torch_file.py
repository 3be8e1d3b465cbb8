"""`pytorch_model.bin`, read without torch and without running code from it.

The file is a zip of a pickle, which describes the tensors, and one raw file per storage. A pickle
may call any function; ours allows the few that tensors need and refuses the rest.
"""

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxgpt.system.errors import BadInput, described

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
MOST_AXES = 8
LONGEST_PICKLE = 100 << 20


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
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor without a storage, or with impossible sizes or strides")
    if len(size) != len(stride) or len(size) > MOST_AXES:
        raise ValueError(f"a tensor of {len(size)} axes and {len(stride)} strides")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


CALLABLE = {
    ("collections", "OrderedDict"): lambda: {},
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}
ALLOWED = CALLABLE | {("torch", name): dtype for name, dtype in STORAGES.items()}
# what torch.save writes for a dictionary of tensors, in pickle's protocols 2 to 5
OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1"
    " BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT"
    " SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID"
    " REDUCE BUILD"
)
_PYTHON = pickle._Unpickler  # the one written in Python, in which every opcode can be replaced


class _Refused(Exception):
    pass


class _Unpickler(_PYTHON):
    """Reads a state dict, whose keys are strings and whose values are tensors.

    Nothing else is ever hashed, compared or printed: if each of forty tuples contains the one
    before twice, that would visit 2^40 tuples.
    """

    dispatch = {
        getattr(pickle, name)[0]: _PYTHON.dispatch[getattr(pickle, name)[0]]
        for name in OPCODES.split()
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise _Refused(f"{module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, saved):
        kind, dtype, key, _, count = saved
        known = kind == "storage" and isinstance(dtype, np.dtype)
        if not known or type(key) is not str or not key.isalnum() or type(count) is not int:
            raise ValueError("a reference to something other than a storage")
        return _Storage(dtype, key, count)

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function not in CALLABLE.values():
            raise ValueError("a call of something other than a function")
        self.append(function(*arguments))

    def _set(self, items: list) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or type(self.stack[-1]) is not dict:
                raise ValueError("a key that is not a name")
            self.stack[-1][key] = value

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: lambda self: self.stack.pop(),  # the versions of torch's modules
        pickle.SETITEM[0]: lambda self: self._set([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._set(self.pop_mark()),
    }


class TorchFile:
    """The tensors of a state dict: `shapes` and `dtypes` by name, `read` for the values."""

    def __init__(self, file: Path):
        self.file = file
        try:
            with zipfile.ZipFile(file) as archive:
                infos = {info.filename: info for info in archive.infolist()}
                (index,) = [name for name in infos if name.endswith("data.pkl")]
                self.folder = index.removesuffix("data.pkl")
                if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
                    raise ValueError("it is compressed, which torch never does")
                if infos[index].file_size > LONGEST_PICKLE:
                    raise ValueError(f"its index has {infos[index].file_size} bytes")
                order = f"{self.folder}byteorder"
                if order in infos and archive.read(order) != b"little":
                    raise ValueError("its numbers are not little-endian")
                state = _Unpickler(io.BytesIO(archive.read(index))).load()
                sizes = {name: info.file_size for name, info in infos.items()}
        except _Refused as e:
            raise BadInput(
                f"{file} wants to run {e}, which a state dict has no use for; refused"
            ) from e
        except zipfile.BadZipFile as e:
            raise BadInput(
                f"{file} is not a zip as torch writes since 1.6, or damaged ({e}); convert it to"
                " safetensors"
            ) from e
        except Exception as e:  # a damaged pickle can raise anything
            raise BadInput(f"{file} is not a state dict of tensors: {described(e)}") from e
        if type(state) is not dict or not all(type(t) is _Tensor for t in state.values()):
            raise BadInput(f"{file} is not a state dict of tensors")
        self.tensors: dict[str, _Tensor] = state
        for name, tensor in self.tensors.items():
            self._check(name, tensor, sizes)
        self.size = file.stat().st_size
        self.shapes = {name: t.shape for name, t in self.tensors.items()}
        self.dtypes = {name: t.storage.dtype for name, t in self.tensors.items()}

    def _check(self, name: str, tensor: _Tensor, sizes: dict[str, int]) -> None:
        storage, steps = tensor.storage, zip(tensor.shape, tensor.stride, strict=True)
        count = math.prod(tensor.shape)
        reach = 1 + sum((n - 1) * step for n, step in steps) if count else 0
        if tensor.offset + reach > storage.count or count > storage.count:
            raise BadInput(f"{self.file}: tensor {name} does not lie within its storage")
        if sizes.get(f"{self.folder}data/{storage.key}") != storage.count * storage.dtype.itemsize:
            raise BadInput(f"{self.file}: the data of tensor {name} is missing or cut short")

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, read from the file."""
        tensor = self.tensors[name]
        dtype = tensor.storage.dtype
        with zipfile.ZipFile(self.file) as archive:
            raw = archive.read(f"{self.folder}data/{tensor.storage.key}")
        strides = [step * dtype.itemsize for step in tensor.stride]
        return np.ndarray(tensor.shape, dtype, raw, tensor.offset * dtype.itemsize, strides)
