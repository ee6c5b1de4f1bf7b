"""Rows of tensors come back equal; anything else in a pickle is refused, named and not run."""

import os
import pickle
import struct

import numpy as np
import pytest
from pickled import records

from equizoo.data.catalyst import open_catalyst
from equizoo.data.pickled_tensors import RefusedRow, decode_row


@pytest.mark.parametrize("style", ["flat", "store"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "i4", "u1", "?"])
def test_tensors_with_offset_and_strides(style, dtype):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 2, (3, 4, 2)).astype(dtype)
    row = decode_row(records(style).dump({"a": array, "b": 1.5, "c": "x"}, 4), "row")
    assert row.keys() == {"a", "b", "c"} and (row["b"], row["c"]) == (1.5, "x")
    assert row["a"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(row["a"], array)


@pytest.mark.parametrize("protocol", [4, 5])
def test_numpy_numbers_and_arrays(protocol):
    value = {"n": np.float64(2.5), "i": np.int64(7), "a": np.arange(6.0).reshape(2, 3)}
    if protocol == 5:  # numpy then keeps arrays in buffers of a kind that no database row has
        del value["a"]
    back = decode_row(pickle.dumps(value, protocol), "row")
    assert (back["n"], back["i"]) == (2.5, 7)
    if "a" in value:
        np.testing.assert_array_equal(back["a"], value["a"])


class Hostile:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


HOSTILE = {
    "a command": (Hostile(os.system, "touch ran"), r"asks for posix\.system"),
    "code": (Hostile(eval, "open('ran', 'w')"), r"asks for builtins\.eval"),
    "attributes": (Hostile(getattr, {}, "keys"), r"asks for builtins\.getattr"),
    "an import": (Hostile(__import__, "os"), r"asks for builtins\.__import__"),
    "an object": (np.random.default_rng(0), r"asks for numpy\.random"),
    "objects in numpy": (np.array([{}], object), "numpy dtype 'O8'"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_what_is_no_record_of_tensors_is_refused(kind, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, message = HOSTILE[kind]
    if protocol == 4:
        with pytest.raises(RefusedRow, match=rf"^data\.lmdb\[3\]: it .*{message}"):
            decode_row(pickle.dumps({"pos": value}, protocol), "data.lmdb[3]")
    else:
        with pytest.raises(RefusedRow, match="was refused, and nothing in it was run"):
            decode_row(pickle.dumps({"pos": value}, protocol), "data.lmdb[3]")
    assert list(tmp_path.iterdir()) == []


def instructions(text: bytes) -> bytes:
    return b"\x80\x04" + text + b"."


@pytest.mark.parametrize(
    "row",
    [
        instructions(b"cos\nsystem\nX\x04\x00\x00\x00echo\x85R"),
        instructions(b"ios\nsystem\n"),  # INST
        instructions(b"(cos\nsystem\nX\x04\x00\x00\x00echoo"),  # OBJ
        instructions(b"\x82\x01"),  # EXT1
        instructions(b"P0\n"),  # PERSID
        instructions(b"}Q"),  # BINPERSID outside of a storage
        instructions(b"\x8c\x02os\x8c\x06system\x93"),
        instructions(b"\x8c\x00\x8c\x06system\x93"),
        instructions(b"ccollections\nOrderedDict\nK\x01\x85R"),  # a dictionary of arguments
        instructions(b"cnumpy\nndarray\n)R"),
        instructions(b"ctorch_geometric.data.data\nData\n)R(X\x01\x00\x00\x00aK\x01u"),
    ],
)
def test_instructions_by_hand_are_refused(row):
    with pytest.raises(RefusedRow, match="was refused"):
        decode_row(row, "row")


def view(flat: np.ndarray, offset: int, size: tuple, stride: tuple) -> bytes:
    """A row that is one tensor."""

    class Pickled:
        def __reduce__(self):
            from pickled import _rebuild_tensor_v2, _Storage

            return _rebuild_tensor_v2, (_Storage(flat), offset, size, stride, False, None)

    return records("flat").dump({"a": Pickled()}, 4)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (2, (3,), (1,)),
        (0, (2, 3), (3, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), (1, 1)),
        (0, (10**5, 10**5), (0, 0)),
        (0, (True,), (1,)),
    ],
)
def test_a_view_beyond_its_storage(offset, size, stride):
    with pytest.raises(ValueError, match="row: no row of tensors, or damaged"):
        decode_row(view(np.zeros(4, "f4"), offset, size, stride), "row")


def test_views_within_their_storage():
    flat = np.arange(4, dtype="f4")
    assert decode_row(view(flat, 1, (3,), (1,)), "row")["a"].tolist() == [1, 2, 3]
    assert decode_row(view(flat, 2, (), ()), "row")["a"].tolist() == 2
    assert decode_row(view(flat, 1, (2, 2), (1, 0)), "row")["a"].tolist() == [[1, 1], [2, 2]]
    assert decode_row(view(flat, 0, (0, 3), (3, 1)), "row")["a"].shape == (0, 3)


def test_storages_that_lie():
    row = records("flat").dump({"a": np.arange(4, dtype="f4")}, 4)
    good = decode_row(row, "row")["a"]
    with pytest.raises(ValueError, match="has 24 bytes|storage of"):
        decode_row(row.replace(struct.pack("<q", 7), struct.pack("<q", 6)), "row")
    with pytest.raises(RefusedRow, match=r"asks for torch\.EvilzStorage"):
        decode_row(row.replace(b"FloatStorage", b"EvilzStorage"), "row")
    with pytest.raises(ValueError, match="damaged"):
        decode_row(row[:-30], "row")
    assert good.tolist() == [0, 1, 2, 3]


def test_work_asked_for_many_times_is_done_once():
    value: list = [1.0]
    for _ in range(7):
        value = [value] * 1000  # 10^21 numbers, were they visited each
    back = decode_row(pickle.dumps(value, 4), "row")
    assert len(back) == 1000 and back[0] is back[999]
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError, match="nested more than 8 deep"):
        decode_row(pickle.dumps(loop, 4), "row")


def test_a_hostile_database_is_refused(tmp_path, monkeypatch):
    from test_catalyst import save_lmdb

    monkeypatch.chdir(tmp_path)
    hostile = pickle.dumps(Hostile(os.system, "touch ran"), 4)
    save_lmdb(tmp_path / "row" / "data.lmdb", {"0": hostile, "length": pickle.dumps(1)})
    source = open_catalyst(tmp_path / "row")
    with pytest.raises(RefusedRow, match=r"data\.lmdb\[0\]: it asks for posix\.system"):
        list(source)
    save_lmdb(tmp_path / "length" / "data.lmdb", {"length": hostile})
    with pytest.raises(RefusedRow, match=r"data\.lmdb\['length'\]: it asks for posix\.system"):
        list(open_catalyst(tmp_path / "length"))
    assert not (tmp_path / "ran").exists()
