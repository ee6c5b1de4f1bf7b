"""Pickles as PyTorch Geometric writes them, made without it: its classes are stood in for."""

import contextlib
import io
import pickle
import struct
import sys
import types
from collections import OrderedDict
from typing import Any

import numpy as np

_STORAGE_OF = {
    "<f4": "FloatStorage",
    "<f8": "DoubleStorage",
    "<i8": "LongStorage",
    "<i4": "IntStorage",
    "|u1": "ByteStorage",
    "|b1": "BoolStorage",
}


@contextlib.contextmanager
def modules(contents: dict[str, dict[str, Any]]):
    """Modules of these names while what is in them is pickled."""
    before = {name: sys.modules.get(name) for name in contents}
    for name, members in contents.items():
        module = types.ModuleType(name)
        for key, member in members.items():
            member.__module__, member.__qualname__ = name, key
            setattr(module, key, member)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _load_from_bytes(content: bytes) -> None: ...
def _rebuild_tensor_v2(*arguments: Any) -> None: ...


class Data: ...


class GlobalStorage: ...


class _Storage:
    def __init__(self, flat: np.ndarray):
        self.flat = flat

    def __reduce__(self):
        return _load_from_bytes, (storage_bytes(self.flat),)


class _Tensor:
    """A view of an array, saved by its storage, offset, size and strides."""

    def __init__(self, array: np.ndarray):
        self.array = np.asarray(array)

    def __reduce__(self):
        array = self.array
        # as a view: transposed strides and an offset, to see that both are undone
        flat = np.concatenate([np.zeros(3, array.dtype), array.T.ravel()])
        stride, step = [], 1
        for size in array.shape:
            stride.append(step)
            step *= size
        arguments = (_Storage(flat), 3, self.array.shape, tuple(stride), False, OrderedDict())
        return _rebuild_tensor_v2, arguments


def storage_bytes(flat: np.ndarray) -> bytes:
    """What torch.save wrote for one storage before its archives became zip files."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, _Storage):
                kind = type(_STORAGE_OF[flat.dtype.str], (), {})
                kind.__module__ = "torch"
                kind.__qualname__ = kind.__name__
                setattr(sys.modules["torch"], kind.__name__, kind)
                return "storage", kind, "94785", "cpu", len(flat), None
            return None

    stream = io.BytesIO()
    sizes = {"short": 2, "int": 4, "long": 4}
    for part in (0x1950A86A20F9469CFC6C, 1001):
        pickle.dump(part, stream, 2)
    pickle.dump({"protocol_version": 1001, "little_endian": True, "type_sizes": sizes}, stream, 2)
    Pickler(stream, 2).dump(_Storage(flat))
    pickle.dump(["94785"], stream, 2)
    stream.write(struct.pack("<q", len(flat)) + flat.tobytes())
    return stream.getvalue()


class records:
    """Rows in the style of PyTorch Geometric 1 (``flat``) or 2 (``store``)."""

    def __init__(self, style: str):
        self.style = style

    def dump(self, fields: dict[str, Any], protocol: int) -> bytes:
        fields = {k: _Tensor(v) if isinstance(v, np.ndarray) else v for k, v in fields.items()}
        stand_ins = {
            "torch": {},
            "torch_geometric": {},
            "torch_geometric.data": {},
            "torch._utils": {"_rebuild_tensor_v2": _rebuild_tensor_v2},
            "torch.storage": {"_load_from_bytes": _load_from_bytes},
            "torch_geometric.data.data": {"Data": Data},
            "torch_geometric.data.storage": {"GlobalStorage": GlobalStorage},
        }
        with modules(stand_ins):
            row = Data()
            if self.style == "flat":
                row.__dict__.update(fields)
            else:
                store = GlobalStorage()
                store.__dict__.update(_mapping=fields, _parent=None)
                row.__dict__.update(_store=store)
            return pickle.dumps(row, protocol)

    @staticmethod
    def dump_plain(value: Any) -> bytes:
        return pickle.dumps(value, 4)
