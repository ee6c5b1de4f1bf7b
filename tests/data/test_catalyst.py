"""OC20 and OC22: the same real frames in all layouts, conversions of references, damaged files."""

import functools
import json
import lzma
import os
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pytest
from ase.io import write
from pickled import records  # tests/data/pickled.py

from equizoo.data.catalyst import open_catalyst
from equizoo.data.catalyst_frames import CatalystFrame, frame_number, system_number
from equizoo.data.catalyst_references import (
    read_adsorption_references,
    read_linear_reference,
    reference_of,
)
from equizoo.data.frames import read_frames
from equizoo.data.pickled_tensors import decode_row
from equizoo.data.reference_energies import reference_energy
from equizoo.structure import EnergyReference, Structure

FOLDERS = [Path(f) for f in os.environ.get("EQUIZOO_DATA", "").split(os.pathsep) if f]
DATA = next((f for f in FOLDERS if (f / "oc20_relax").is_dir()), None)
TOTAL, ADSORPTION = EnergyReference.TOTAL, EnergyReference.ADSORPTION
real_frames = pytest.mark.skipif(
    DATA is None, reason="needs oc20_relax and oc22_sample in EQUIZOO_DATA"
)


def folder(name: str) -> Path:
    assert DATA is not None
    return DATA / name


def by_id(frames) -> dict[str, CatalystFrame]:
    collected = list(frames)
    found = {frame.id: frame for frame in collected}
    assert len(found) == len(collected)
    return found


@functools.cache
def raw_frames(name: str) -> dict[str, CatalystFrame]:
    source = open_catalyst(folder(name))
    found = by_id(source)
    assert len(found) == len(source)
    return found


def close(a, b, dtype: type) -> None:
    """Equal but for the text's eighth decimal and one rounding to ``dtype``."""
    rtol = np.finfo(np.float32).eps if dtype == np.float32 else 0.0
    np.testing.assert_allclose(a, b, atol=5.1e-9, rtol=rtol)


def agree(a: CatalystFrame, b: CatalystFrame, dtype: type) -> None:
    """Every field that both layouts have."""
    assert (a.sid, a.fid, a.energy_reference) == (b.sid, b.fid, b.energy_reference)
    assert a.structure.pbc == b.structure.pbc
    assert a.structure.energy == b.structure.energy
    for field in ("fixed", "tags"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)
    np.testing.assert_array_equal(a.structure.atomic_numbers, b.structure.atomic_numbers)
    for field in ("positions", "cell", "forces"):
        close(getattr(a.structure, field), getattr(b.structure, field), dtype)


@real_frames
@pytest.mark.parametrize(
    ("raw", "other", "count", "dtype"),
    [
        ("s2ef_val", "lmdb/s2ef/val_20", 20, np.float32),
        ("s2ef_val", "aselmdb/val_20", 20, np.float64),
        ("s2ef_train", "lmdb/s2ef/train_100", 100, np.float32),
    ],
)
def test_layouts_of_oc20_agree(raw, other, count, dtype):
    expected = raw_frames(f"oc20_relax/{raw}")
    found = by_id(open_catalyst(folder(f"oc20_relax/{other}"), TOTAL))
    assert len(found) == count
    for name, frame in found.items():
        agree(expected[name], frame, dtype)


@real_frames
def test_layouts_of_oc22_agree():
    lmdb_rows = by_id(open_catalyst(folder("oc22_sample/lmdb/train")))
    ase_rows = by_id(open_catalyst(folder("oc22_sample/aselmdb/train"), TOTAL))
    text = read_frames(folder("oc22_sample/oc22_train16.xyz.xz"), ":")
    original = decode_row(folder("oc22_sample/oc22_pickle16_train.pkl").read_bytes(), "original")
    assert len(lmdb_rows) == len(ase_rows) == len(text) == len(original) == 16
    assert lmdb_rows.keys() == ase_rows.keys()
    for name, frame in lmdb_rows.items():
        agree(frame, ase_rows[name], np.float32)
    for atoms, row in zip([frame.atoms for frame in text], original, strict=True):
        frame = lmdb_rows[f"{row['sid']}_{row['fid']}"]
        assert (atoms.info["sid"], atoms.info["fid"]) == (frame.sid, frame.fid)
        assert row["y"] == frame.structure.energy == atoms.calc.results["energy"]
        for values, of_row in (
            (frame.structure.positions, row["pos"]),
            (frame.structure.cell, row["cell"][0]),
            (frame.structure.forces, row["force"]),
            (frame.tags, row["tags"]),
            (frame.fixed, row["fixed"]),
            (frame.structure.atomic_numbers, row["atomic_numbers"]),
        ):
            np.testing.assert_array_equal(values, of_row)
        close(atoms.positions, row["pos"], np.float32)
        close(atoms.calc.results["forces"], row["force"], np.float32)


@real_frames
def test_initial_structures_are_ends_of_their_relaxations():
    frames = raw_frames("oc20_relax/s2ef_train") | raw_frames("oc20_relax/s2ef_val")
    source = open_catalyst(folder("oc20_relax/lmdb/is2re/train"), TOTAL)
    assert len(source) == 23
    for system in source:
        path = sorted((f for f in frames.values() if f.sid == system.sid), key=lambda f: f.fid)
        first, last = path[0], path[-1]
        assert system.fid is None and system.id == str(system.sid)
        assert system.structure.energy == first.structure.energy
        assert system.relaxed_energy == last.structure.energy
        for ours, theirs in (
            (system.structure.positions, first.structure.positions),
            (system.relaxed_positions, last.structure.positions),
            (system.structure.cell, first.structure.cell),
        ):
            close(ours, theirs, np.float32)
        np.testing.assert_array_equal(system.fixed, first.fixed)
        np.testing.assert_array_equal(system.tags, first.tags)
        target = system.to_direct_target()
        assert target.energy == system.relaxed_energy and target.forces is None
        np.testing.assert_array_equal(target.info["fixed"], system.fixed)


@real_frames
def test_a_part_is_the_same_as_a_part_of_the_whole():
    for name in ("oc20_relax/s2ef_val", "oc20_relax/lmdb/s2ef/val_20", "oc20_relax/aselmdb/val_20"):
        source = open_catalyst(folder(name), TOTAL)
        ids = [frame.id for frame in source.frames(stop=20)]
        assert [frame.id for frame in source.frames(7, 12)] == ids[7:12]


@real_frames
def test_total_energies_are_not_taken_for_adsorption_energies():
    source = open_catalyst(folder("oc20_relax/lmdb/s2ef/train_100"))
    with pytest.raises(ValueError, match="no adsorption energy.*--data-energy-reference total"):
        list(source)


@real_frames
def test_the_reference_of_the_sample_is_not_known():
    frame = next(iter(open_catalyst(folder("oc20_relax/s2ef_val"))))
    assert frame.reference is None
    with pytest.raises(ValueError, match="needs the energy of its clean surface"):
        frame.in_reference(ADSORPTION)
    moved = frame.in_reference(ADSORPTION, -58.0)
    assert moved.structure.energy == frame.structure.energy + 58.0
    assert moved.in_reference(TOTAL).structure.energy == pytest.approx(frame.structure.energy)
    with pytest.raises(ValueError, match="expected adsorption and total"):
        frame.in_reference(EnergyReference.FORMATION)


@real_frames
def test_raw_relaxations(tmp_path):
    expected = {system.sid: system for system in open_catalyst(
        folder("oc20_relax/lmdb/is2re/train"), TOTAL
    )}  # fmt: skip
    texts: dict[int, list] = {}
    for frame in raw_frames("oc20_relax/s2ef_val").values():
        texts.setdefault(frame.sid, []).append(frame)
    sids = sorted(texts)[:2]
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "system.txt").write_text(f"random{sids[0]},-7.5\nrandom{sids[1]},0.0\n")
    with lzma.open(folder("oc20_relax/s2ef_val/0.txt.xz"), "rt") as file:
        names = [line.split(",")[:2] for line in file]
    read = read_frames(folder("oc20_relax/s2ef_val/0.extxyz.xz"), ":")
    originals = {
        (system_number(sid, ""), frame_number(fid, "")): frame.atoms
        for (sid, fid), frame in zip(names, read, strict=True)
    }
    for sid in sids:
        atoms = [originals[key] for key in sorted(originals) if key[0] == sid]
        with lzma.open(tmp_path / "0" / f"random{sid}.extxyz.xz", "wt") as file:
            write(file, atoms, format="extxyz")
    systems = list(open_catalyst(tmp_path))
    assert [s.sid for s in systems] == sids
    assert [s.reference for s in systems] == [-7.5, None]
    for system in systems:
        other = expected[system.sid]
        assert system.relaxed_energy == other.relaxed_energy
        close(system.relaxed_positions, other.relaxed_positions, np.float32)
        np.testing.assert_array_equal(system.fixed, other.fixed)
    whole = list(open_catalyst(tmp_path).trajectory(0))
    assert [f.fid for f in whole] == list(range(len(texts[sids[0]])))


def frame(**changes) -> CatalystFrame:
    structure = Structure(
        atomic_numbers=np.array([29, 8]),
        positions=np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.5]]),
        cell=np.eye(3) * 8.0,
        pbc=(True, True, True),
        energy=-1.25,
        name="a[0]",
    )
    fields = dict(structure=structure, sid=3, fid=4, fixed=np.array([True, False]))
    return CatalystFrame(**(fields | dict(energy_reference=ADSORPTION) | changes))


def test_names_of_systems_and_frames():
    assert [system_number(x, "") for x in ("random12", 12, "12-frame-7")] == [12, 12, 12]
    assert (frame_number("frame7", ""), frame_number(7, "")) == (7, 7)
    assert (frame().id, frame(fid=None).id) == ("3_4", "3")
    with pytest.raises(ValueError, match="expected a number, or 'random'"):
        system_number("abc", "x[0]")
    with pytest.raises(ValueError, match="expected 'frame39'"):
        frame_number(None, "x[0]")
    with pytest.raises(ValueError, match="fixed is for 3 atoms, expected 2"):
        frame(fixed=np.zeros(3, bool))


def save_lmdb(path: Path, rows: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in rows.items():
            transaction.put(key.encode(), value)
    return path


@pytest.mark.parametrize("style", ["flat", "store"])
@pytest.mark.parametrize("protocol", [4, 5])
def test_old_rows_of_every_kind(tmp_path, style, protocol):
    fields = {
        "pos": np.arange(6, dtype="f4").reshape(2, 3),
        "cell": (9 * np.eye(3, dtype="f4"))[None],
        "atomic_numbers": np.array([29, 8], "u1"),
        "natoms": 2,
        "tags": np.array([0, 2]),
        "fixed": np.array([1.0, 0.0], "f4"),
        "sid": np.array([17]),
        "fid": np.array(5),
        "energy": np.array(-0.5),
        "forces": np.ones((2, 3), "f4"),
        "x": None,
    }
    row = records(style).dump(fields, protocol)
    save_lmdb(tmp_path / "data.0000.lmdb", {"0": row, "length": records(style).dump_plain(1)})
    (found,) = open_catalyst(tmp_path)
    assert (found.id, found.structure.energy) == ("17_5", -0.5)
    assert found.fixed.tolist() == [True, False] and found.tags.tolist() == [0, 2]
    np.testing.assert_array_equal(found.structure.positions, fields["pos"])
    np.testing.assert_array_equal(found.structure.forces, 1.0)
    np.testing.assert_array_equal(found.structure.cell, 9 * np.eye(3))


def test_a_row_without_labels_or_length(tmp_path):
    fields = {
        "pos": np.zeros((1, 3), "f4"),
        "cell": (9 * np.eye(3, dtype="f4"))[None],
        "atomic_numbers": np.array([8.0], "f4"),
        "tags": np.array([2]),
        "fixed": np.array([0.0], "f4"),
        "sid": 3,
    }
    rows = {str(i): records("store").dump(fields | {"sid": i}, 4) for i in range(12)}
    path = save_lmdb(tmp_path / "data.lmdb", rows)
    source = open_catalyst(path)
    assert [f.sid for f in source] == list(range(12))
    assert next(iter(source)).structure.energy is None
    with pytest.raises(ValueError, match="relaxed energy"):
        next(iter(source)).to_direct_target()
    assert source.num_atoms is None
    np.savez(tmp_path / "metadata.npz", natoms=np.ones(12, np.int32))
    assert open_catalyst(path).num_atoms.tolist() == [1] * 12
    np.savez(tmp_path / "metadata.npz", natoms=np.ones(11, np.int32))
    with pytest.raises(ValueError, match="belongs to other data"):
        _ = open_catalyst(path).num_atoms


def test_rows_of_oc22_are_total_energies(tmp_path):
    fields = {
        "pos": np.zeros((1, 3), "f4"),
        "cell": (9 * np.eye(3, dtype="f4"))[None],
        "atomic_numbers": np.array([8.0], "f4"),
        "fixed": np.array([0.0], "f4"),
        "sid": 3,
        "y": -566.0,
        "oc22": 1,
    }
    path = save_lmdb(tmp_path / "data.lmdb", {"0": records("store").dump(fields, 4)})
    assert next(iter(open_catalyst(path))).energy_reference == TOTAL
    with pytest.raises(ValueError, match="'total' and 'adsorption'"):
        list(open_catalyst(path, ADSORPTION))
    lacking = {k: v for k, v in fields.items() if k != "fixed"}
    path = save_lmdb(tmp_path / "b" / "data.lmdb", {"0": records("store").dump(lacking, 4)})
    with pytest.raises(ValueError, match="fixed is missing, expected a tensor"):
        list(open_catalyst(path))


def ase_row(**changes) -> bytes:
    row = {
        "numbers": {"__ndarray__": [[2], "int64", [29, 8]]},
        "positions": {"__ndarray__": [[2, 3], "float64", [0, 0, 0, 0, 0, 1.5]]},
        "cell": {"__ndarray__": [[3, 3], "float64", [8, 0, 0, 0, 8, 0, 0, 0, 8]]},
        "pbc": {"__ndarray__": [[3], "bool", [True, True, True]]},
        "energy": -1.5,
        "constraints": [{"name": "FixAtoms", "kwargs": {"indices": [0]}}],
        "data": {"sid": "7-frame-3"},
    }
    return zlib.compress(json.dumps(row | changes).encode())


def test_aselmdb_rows(tmp_path):
    rows = {str(i): ase_row(energy=float(i)) for i in (1, 2, 11)}  # 3 to 10 were deleted
    save_lmdb(tmp_path / "a.aselmdb", rows | {"nextid": b"12"})
    frames = list(open_catalyst(tmp_path))
    assert [f.structure.energy for f in frames] == [1.0, 2.0, 11.0]
    assert (frames[0].id, frames[0].fixed.tolist(), frames[0].tags) == ("7_3", [True, False], None)
    other = {"name": "FixBondLength", "kwargs": {}}
    save_lmdb(tmp_path / "b" / "a.aselmdb", {"1": ase_row(constraints=[other])})
    with pytest.raises(ValueError, match="has the constraint FixBondLength"):
        list(open_catalyst(tmp_path / "b"))
    save_lmdb(tmp_path / "c" / "a.aselmdb", {"1": b"nonsense"})
    with pytest.raises(ValueError, match="damaged"):
        list(open_catalyst(tmp_path / "c"))


def test_files_that_are_no_data_of_oc20(tmp_path):
    with pytest.raises(ValueError, match="expected a folder with"):
        open_catalyst(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_catalyst(tmp_path / "data.lmdb")
    (tmp_path / "data.lmdb").write_bytes(b"0" * 8192)
    with pytest.raises(ValueError, match="no LMDB file, or damaged"):
        open_catalyst(tmp_path / "data.lmdb")


def s2ef(path: Path, lines: str, count: int = 2) -> Path:
    comment = 'Lattice="8 0 0 0 8 0 0 0 8" Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:'
    comment += 'forces:R:3 energy=-7.5 pbc="T T T"'
    text = f"2\n{comment}\nCu 0 0 0 F 0 1 2 3\nO 0 0 1.5 T 2 -1 -2 -3\n"
    with lzma.open(path / "0.extxyz.xz", "wt") as file:
        file.write(text * count)
    with lzma.open(path / "0.txt.xz", "wt") as file:
        file.write(lines)
    return path


def test_raw_frames_keep_forces_on_fixed_atoms(tmp_path):
    source = open_catalyst(s2ef(tmp_path, "random3,frame1,-6.25\nrandom3,frame2,-6.25\n"))
    first, second = source
    assert (first.id, second.id) == ("3_1", "3_2")
    assert first.fixed.tolist() == [True, False] and first.tags.tolist() == [0, 2]
    assert first.structure.forces.tolist() == [[1, 2, 3], [-1, -2, -3]]
    assert first.in_reference(ADSORPTION).structure.energy == -1.25
    with pytest.raises(ValueError, match="'adsorption' and 'total'"):
        open_catalyst(tmp_path, ADSORPTION)


@pytest.mark.parametrize(
    ("lines", "count", "message"),
    [
        ("random3,frame1,-6.25\n", 2, "more frames than 0.txt.xz has lines"),
        ("random3,frame1,-6.25\n" * 3, 2, "ends after 2 frames"),
        ("random3,frame1\n" * 2, 2, "expected random1234,frame5"),
    ],
)
def test_pairs_that_do_not_match(tmp_path, lines, count, message):
    with pytest.raises(ValueError, match=message):
        list(open_catalyst(s2ef(tmp_path, lines, count)))


def test_references(tmp_path):
    (tmp_path / "ref.pkl").write_bytes(records("flat").dump_plain({"random12": -7.5, "random3": 1}))
    references = read_adsorption_references(tmp_path / "ref.pkl")
    assert references == {12: -7.5, 3: 1.0}
    assert reference_of(references, 12) == -7.5
    with pytest.raises(ValueError, match="no reference energy for system 4 among 2"):
        reference_of(references, 4)
    (tmp_path / "bad.pkl").write_bytes(records("flat").dump_plain([1]))
    with pytest.raises(ValueError, match="expected a dictionary"):
        read_adsorption_references(tmp_path / "bad.pkl")


def test_linear_reference_knows_no_element_outside_its_fit(tmp_path):
    coefficients = np.zeros(100)
    coefficients[[1, 2, 8, 29]] = -3.5, -5.8e10, -7.25, -1.5
    np.savez(tmp_path / "linear.npz", coeff=coefficients)
    found = read_linear_reference(tmp_path / "linear.npz")
    assert found == {1: -3.5, 8: -7.25, 29: -1.5}
    assert reference_energy(np.array([8, 8, 29]), found) == -16.0
    with pytest.raises(ValueError, match="No reference energy for He"):
        reference_energy(np.array([2, 8]), found)
    with pytest.raises(ValueError, match="no energy for He, B, not in its fit"):
        read_linear_reference(tmp_path / "linear.npz", (2, 5, 8))
    np.savez(tmp_path / "other.npz", mean=coefficients)
    with pytest.raises(ValueError, match="expected the array 'coeff'"):
        read_linear_reference(tmp_path / "other.npz")
