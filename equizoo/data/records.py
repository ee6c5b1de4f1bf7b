"""Structures as bytes and back, bit for bit: msgpack of plain values, and nothing that runs code.

A record is a map of the fields that differ from their defaults. Arrays are their dtype, shape and
bytes; a stored neighbour list keeps shifts in single bytes where they fit.
"""

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from equizoo.neighbors import Neighbors
from equizoo.structure import Structure

_ARRAY, _SCALAR, _TUPLE = 1, 2, 3  # codes of msgpack's extension types
_KINDS = "biufcSU"  # of dtypes: plain numbers and text, no objects
_FIELDS = ("atomic_numbers", "positions", "cell", "pbc", "energy", "forces", "stress")
_STATE = {"charge": 0.0, "spin": 1.0, "head": None, "name": ""}
_NEIGHBORS = "neighbors"


def encode(structure: Structure, neighbors: Neighbors | None = None) -> bytes:
    """The structure, with its neighbours where given, as one record.

    Raises ``ValueError`` naming what in ``info`` is neither numbers, text, an array of these nor a
    list or mapping of such.
    """
    record = {name: getattr(structure, name) for name in _FIELDS}
    record |= {k: v for k, d in _STATE.items() if (v := getattr(structure, k)) != d}
    record = {name: value for name, value in record.items() if value is not None}
    if structure.info:
        record["info"] = dict(structure.info)
    if neighbors is not None:
        senders, receivers, shifts = neighbors
        small = shifts.astype(np.int8)
        counts = np.bincount(receivers, minlength=structure.num_nodes).astype(np.int32)
        shifts = small if np.array_equal(small, shifts) else shifts
        record[_NEIGHBORS] = [senders, counts, shifts]
    try:
        return msgpack.packb(_plain(record), strict_types=True)
    except (TypeError, OverflowError, ValueError) as error:
        raise ValueError(
            f"Structure {structure.name or '(unnamed)'} cannot be stored: {error}. What it carries "
            "in info must be numbers, text, arrays of these, or lists and mappings of such; drop "
            "the rest with dataclasses.replace(structure, info={...})."
        ) from error


def decode(record: bytes, where: str) -> tuple[Structure, Neighbors | None]:
    """What :func:`encode` was given; ``ValueError`` naming ``where`` for anything else."""
    try:
        fields = msgpack.unpackb(record, ext_hook=_extension, strict_map_key=False)
        stored = fields.pop(_NEIGHBORS, None)
        structure = Structure(**{"energy": None, "forces": None, "stress": None} | fields)
        neighbors = None
        if stored is not None:
            senders, counts, shifts = stored
            receivers = np.repeat(np.arange(structure.num_nodes, dtype=np.int32), counts)
            neighbors = Neighbors(senders, receivers, shifts.astype(np.int32))
            if not len(senders) == len(receivers) == len(shifts):
                raise ValueError("neighbours of different lengths")
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise ValueError(
            f"{where} is no structure ({error}). The file is damaged or of another program: "
            "prepare the data again."
        ) from error
    return structure, neighbors


def _plain(value: Any) -> Any:
    """The value with arrays, scalars of numpy and tuples as extension types, at any depth."""
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in _KINDS:
            raise ValueError(f"an array of dtype {value.dtype}")
        shape = list(value.shape)
        content = msgpack.packb([value.dtype.str, shape, value.tobytes()])
        return msgpack.ExtType(_ARRAY if isinstance(value, np.ndarray) else _SCALAR, content)
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, msgpack.packb([_plain(item) for item in value]))
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise ValueError(f"the key {key!r}, neither text nor a whole number")
        return {key: _plain(item) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise ValueError(f"a {type(value).__name__}, {str(value)[:60]!r}")


def _extension(code: int, content: bytes) -> Any:
    if code == _TUPLE:
        return tuple(msgpack.unpackb(content, ext_hook=_extension, strict_map_key=False))
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"an unknown type of value, {code}")
    dtype, shape, buffer = msgpack.unpackb(content)
    if np.dtype(dtype).kind not in _KINDS:
        raise ValueError(f"an array of dtype {dtype[:40]!r}")
    array = np.frombuffer(buffer, dtype).reshape(shape)
    return array if code == _ARRAY else array[()]
