"""Rows of old OC20 and OC22 databases, which are pickles, decoded without running anything in them.

A pickle is a program for a stack machine, and a general one can call any function. This machine
knows only what PyTorch Geometric's records of plain tensors consist of: containers, numbers, text,
and the few names in ``_KNOWN``, which build arrays here and are imported from nowhere. Any other
name or instruction is refused before it has an effect.
"""

import enum
import io
import math
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before its archives became zip files
_MOST_ELEMENTS = 100_000_000  # of a tensor; a few bytes can ask for any number by strides of zero
_STORAGES = {
    "Float": "<f4",
    "Double": "<f8",
    "Half": "<f2",
    "Long": "<i8",
    "Int": "<i4",
    "Short": "<i2",
    "Char": "<i1",
    "Byte": "<u1",
    "Bool": "<?",
}


class RefusedRow(ValueError):
    """A row asks for something that no record of tensors needs."""


class _Known(enum.Enum):
    RECORD = "an object of attributes"
    NAME = "a class that is only mentioned"
    DICT = "an empty dictionary"
    TENSOR = "a view of a storage"
    STORAGE = "a storage from bytes"
    NUMPY_SCALAR = "a numpy scalar"
    NUMPY_ARRAY = "an empty numpy array, filled by its state"
    NUMPY_DTYPE = "a numpy dtype"
    NUMPY_CLASS = "numpy.ndarray"


_KNOWN: Mapping[tuple[str, str], _Known] = {
    ("torch_geometric.data.data", "Data"): _Known.RECORD,
    ("torch_geometric.data.storage", "GlobalStorage"): _Known.RECORD,
    ("torch_geometric.data.data", "DataEdgeAttr"): _Known.NAME,
    ("torch_geometric.data.data", "DataTensorAttr"): _Known.NAME,
    ("collections", "OrderedDict"): _Known.DICT,
    ("torch._utils", "_rebuild_tensor_v2"): _Known.TENSOR,
    ("torch.storage", "_load_from_bytes"): _Known.STORAGE,
    ("numpy", "dtype"): _Known.NUMPY_DTYPE,
    ("numpy", "ndarray"): _Known.NUMPY_CLASS,
    **{
        (f"{core}.multiarray", name): known
        for core in ("numpy.core", "numpy._core")
        for name, known in (
            ("scalar", _Known.NUMPY_SCALAR),
            ("_reconstruct", _Known.NUMPY_ARRAY),
        )
    },
}
_STORAGE_CLASSES: Mapping[tuple[str, str], np.dtype] = {
    ("torch", f"{name}Storage"): np.dtype(code) for name, code in _STORAGES.items()
}


class _Record:
    """Attributes of an object whose class is not there."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {}


class _PendingArray:
    def __init__(self) -> None:
        self.array: np.ndarray | None = None


class _PendingDtype:
    def __init__(self, code: str):
        self.dtype = _plain_dtype(code)


def decode_row(data: bytes, where: str) -> Any:
    """The value of a pickled row: numbers, text, containers and numpy arrays.

    A PyTorch Geometric ``Data`` becomes the dictionary of its attributes, a tensor an array with
    its dtype and strides undone. Raises :class:`RefusedRow`, naming what was asked for, when the
    row needs anything else, and ``ValueError`` when it is damaged; ``where`` is for the message.
    """
    try:
        return _plain(_Machine(_KNOWN, _call).run(io.BytesIO(data)), {})
    except RefusedRow as error:
        raise RefusedRow(
            f"{where}: {error}. Records of tensors need no such thing: the row was refused, and "
            "nothing in it was run. Do not open the file with other programs unless you trust it."
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{where}: no row of tensors, or damaged ({type(error).__name__}: {error}). "
            "Fetch the file again."
        ) from error


class _Machine:
    """The stack machine; ``call`` answers for the names in ``known``."""

    def __init__(
        self,
        known: Mapping[tuple[str, str], Any],
        call: Callable[[Any, Any], Any],
        persistent: Callable[[Any], Any] | None = None,
    ):
        self._known, self._call, self._persistent = known, call, persistent

    def run(self, stream: io.BytesIO) -> Any:
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def pop_to_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for opcode, value, _ in pickletools.genops(stream):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case (
                    "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT"
                    | "SHORT_BINUNICODE" | "BINUNICODE" | "SHORT_BINBYTES" | "BINBYTES"
                    | "BINBYTES8"
                ):  # fmt: skip
                    stack.append(value)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE":
                    stack.append(True)
                case "NEWFALSE":
                    stack.append(False)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(pop_to_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    size = int(opcode.name[-1])
                    if len(stack) < size:
                        raise IndexError("a tuple of more than there is")
                    stack[-size:] = [tuple(stack[-size:])]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINPUT" | "LONG_BINPUT":
                    memo[_integer(value)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[_integer(value)])
                case "SETITEM":
                    item, key = stack.pop(), stack.pop()
                    _dictionary(stack[-1])[key] = item
                case "SETITEMS":
                    items = pop_to_mark()
                    _dictionary(stack[-1]).update(zip(items[::2], items[1::2], strict=True))
                case "APPEND":
                    item = stack.pop()
                    _list(stack[-1]).append(item)
                case "APPENDS":
                    items = pop_to_mark()
                    _list(stack[-1]).extend(items)
                case "GLOBAL":
                    stack.append(self._find(*str(value).split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(self._find(module, name))
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(self._call(function, arguments))
                case "BUILD":
                    state = stack.pop()
                    _build(stack[-1], state)
                case "BINPERSID" if self._persistent is not None:
                    stack.append(self._persistent(stack.pop()))
                case "STOP":
                    (result,) = stack
                    return result
                case other:
                    raise RefusedRow(f"it has the instruction {other}")
        raise ValueError("it ends without STOP")

    def _find(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedRow("it names something by what is not text")
        known = self._known.get((module, name))
        if known is None:
            raise RefusedRow(f"it asks for {module[:80]}.{name[:80]}")
        return known


def _call(function: Any, arguments: Any) -> Any:
    match function:
        case _Known.RECORD:
            return _Record()
        case _Known.DICT if arguments == ():
            return {}
        case _Known.STORAGE:
            (content,) = arguments
            return _storage(content)
        case _Known.TENSOR:
            return _tensor(*arguments)
        case _Known.NUMPY_DTYPE:
            return _PendingDtype(arguments[0])
        case _Known.NUMPY_SCALAR:
            dtype, content = arguments
            return np.frombuffer(content, dtype.dtype, count=1)[0].item()
        case _Known.NUMPY_ARRAY:
            return _PendingArray()
    raise RefusedRow(f"it calls {str(getattr(function, 'value', type(function).__name__))[:80]}")


def _build(target: Any, state: Any) -> None:
    if isinstance(target, _Record) and isinstance(state, dict):
        target.state.update(state)
    elif isinstance(target, _PendingDtype):
        # (version, byte order, subdtype, names, fields, ...): plain numbers have none of the last
        if state[1] not in ("<", "|", "=") or any(part is not None for part in state[2:5]):
            raise RefusedRow("it has a numpy dtype other than little-endian numbers")
    elif isinstance(target, _PendingArray):
        _, shape, dtype, fortran, content = state
        flat = np.frombuffer(content, dtype.dtype)
        target.array = flat.reshape(shape, order="F" if fortran else "C").copy()
    else:
        raise RefusedRow(f"it sets the state of {type(target).__name__}")


def _plain_dtype(code: Any) -> np.dtype:
    if not isinstance(code, str) or code not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1",
                                                 "b1"):  # fmt: skip
        raise RefusedRow(f"it has the numpy dtype {str(code)[:20]!r}")
    return np.dtype(code).newbyteorder("<")


def _storage(content: Any) -> np.ndarray:
    """The one storage in what ``torch.save`` wrote in its old format."""
    if not isinstance(content, bytes):
        raise TypeError("a storage is not made of bytes")
    dtypes: list[np.dtype] = []

    def persistent(reference: Any) -> Any:
        kind, dtype, key, _, count, view = reference[:6]
        if kind != "storage" or not isinstance(dtype, np.dtype) or view is not None:
            raise RefusedRow(f"it has a stored {str(kind)[:40]!r} of another kind")
        dtypes.append(dtype)
        return key, _integer(count)

    def no_calls(function: Any, arguments: Any) -> Any:
        raise RefusedRow("it calls a function inside of a storage")

    stream = io.BytesIO(content)
    machine = _Machine(_STORAGE_CLASSES, no_calls, persistent)
    magic, _, system = (machine.run(stream) for _ in range(3))
    if magic != _MAGIC or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedRow("it has a storage in another format than torch's old little-endian one")
    key, count = machine.run(stream)
    if machine.run(stream) != [key] or len(dtypes) != 1:
        raise ValueError("a storage has another number of parts than one")
    stored = int.from_bytes(stream.read(8), "little")
    raw = stream.read()
    if stored != count or len(raw) != count * dtypes[0].itemsize:
        raise ValueError(f"a storage of {count} numbers has {len(raw)} bytes")
    return np.frombuffer(raw, dtypes[0])


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, *hooks: Any
) -> np.ndarray:
    """A copy of the view, after a check that it lies within the storage."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise RefusedRow("it has a tensor without a storage")
    offset, size, stride = (
        _integer(offset),
        tuple(map(_integer, size)),
        tuple(map(_integer, stride)),
    )
    if len(size) != len(stride) or len(size) > 8 or min((offset, *size, *stride)) < 0:
        raise ValueError(f"a tensor of size {size[:8]} has strides {stride[:8]}")
    if math.prod(size) > _MOST_ELEMENTS:
        raise ValueError(f"a tensor has size {size}")
    if math.prod(size) == 0:
        return np.zeros(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= len(storage):
        raise ValueError(f"a tensor reaches to {last} in a storage of {len(storage)} numbers")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False).copy()


def _plain(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """Records and arrays under construction replaced by what they stand for.

    What is there several times is replaced once (``seen``), else a few bytes could ask for any
    amount of work.
    """
    if depth > 8:
        raise ValueError("it is nested more than 8 deep")
    if not isinstance(value, (_Record, _PendingArray, _PendingDtype, _Known, dict, list, tuple)):
        return value
    if id(value) not in seen:
        seen[id(value)] = _replaced(value, seen, depth)
    return seen[id(value)]


def _replaced(value: Any, seen: dict[int, Any], depth: int) -> Any:
    if isinstance(value, _Record):
        state = value.state
        if isinstance(state.get("_store"), _Record):  # PyTorch Geometric 2
            state = state["_store"].state
        value = state.get("_mapping", state)
    if isinstance(value, _PendingArray):
        return value.array
    if isinstance(value, dict):
        return {key: _plain(v, seen, depth + 1) for key, v in value.items() if key != "_parent"}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v, seen, depth + 1) for v in value)
    return None  # a class that is only mentioned


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{type(value).__name__} in the place of an integer")
    return value


def _dictionary(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise RefusedRow(f"it sets items of {type(value).__name__}")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise RefusedRow(f"it appends to {type(value).__name__}")
    return value
