"""Structures survive as they are; nothing else is stored or believed."""

import dataclasses

import msgpack
import numpy as np
import pytest

from equizoo.data.records import decode, encode
from equizoo.graph import make_frame
from equizoo.structure import Structure


def make_structure(**changes) -> Structure:
    rng = np.random.default_rng(3)
    plain = Structure(
        atomic_numbers=np.array([8, 1, 1]),
        positions=rng.normal(size=(3, 3)),
        cell=np.array([[3.0, 0.1, 0], [0, 4.0, 0], [0.3, 0, 5.0]]),
        pbc=(True, False, True),
        name="water.xyz[7]",
    )
    return dataclasses.replace(plain, **changes)


RNG = np.random.default_rng(0)
STRUCTURES = {
    "plain": make_structure(),
    "energy alone": make_structure(energy=-0.1 - 2**-50),
    "all labels": make_structure(
        energy=-1e4 / 3, forces=RNG.normal(size=(3, 3)), stress=np.diag([1e-300, -0.0, 2.0])
    ),
    "state": make_structure(charge=-1.0, spin=3.0, head="omat", name=""),
    "carried": make_structure(
        info={
            "fixed": np.array([True, False, True]),
            "tags": np.array([0, 1, 2], np.int8),
            "single": np.array([1, 2], np.float32).reshape(1, 2),
            "big endian": np.arange(3, dtype=">f8"),
            "words": np.array(["a", "bcd"]),
            "scalar": np.float32(0.1),
            "whole": 2**62,
            "nested": {"tuple": (1, (2.5, None)), "list": [True, "x"], 3: b"bytes"},
            "not a number": float("nan"),
        }
    ),
}


def assert_same(a, b, where=""):
    """Equal values of equal types, arrays bit for bit."""
    if isinstance(a, np.ndarray | np.generic):
        assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape, where
        assert a.tobytes() == b.tobytes(), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b), where
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, where)
    else:
        assert type(a) is type(b), where
        assert a == b or (a != a and b != b), where


def assert_same_structure(a: Structure, b: Structure):
    for field in dataclasses.fields(Structure):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert_same(*((dict(x), dict(y)) if field.name == "info" else (x, y)), field.name)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_every_field_comes_back_bit_for_bit(structure):
    back, neighbors = decode(encode(structure), "here")
    assert_same_structure(structure, back)
    assert neighbors is None
    assert encode(back) == encode(structure)


def test_neighbors_come_back_with_it():
    structure = make_structure()
    found = make_frame(structure, 7.0, (1, 8)).neighbors
    _, neighbors = decode(encode(structure, found), "here")
    for a, b in zip(found, neighbors, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    far = found._replace(shifts=found.shifts * 300)
    np.testing.assert_array_equal(decode(encode(structure, far), "")[1].shifts, far.shifts)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "a object"),
        (np.array([object()]), "dtype object"),
        ({1.5: 2}, "the key 1.5"),
        (2**70, "too large|Integer"),
        (1j, "a complex"),
    ],
)
def test_what_is_no_plain_value_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=rf"(?s)water.xyz\[7\] cannot be stored.*({message})"):
        encode(make_structure(info={"odd": value}))


def test_what_is_no_record_is_refused():
    record = encode(make_structure())
    objects = msgpack.packb({"info": msgpack.ExtType(1, msgpack.packb(["|O", [1], bytes(8)]))})
    code = msgpack.packb({"info": msgpack.ExtType(42, b"import os")})
    unknown = msgpack.packb(msgpack.unpackb(record) | {"velocity": 1})
    for bad in (record[:-3], record[1:], b"", b"\x80", objects, code, unknown):
        with pytest.raises(
            ValueError, match=r"shard\[3\] is no structure .* prepare the data again"
        ):
            decode(bad, "shard[3]")
