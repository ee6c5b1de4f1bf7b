"""Readers: every label read raw or known to be absent, every frame accounted for, no cut file."""

import bz2
import dataclasses
import gzip
import io
import lzma
import os
import warnings
from pathlib import Path

import ase.io
import ase.io.ulm
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equizoo.data import LabelKeys, read_isolated_atoms, read_structures, write_structures
from equizoo.structure import EnergyReference, Structure

COMPRESS = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}


def slab(seed: int = 0, symbols: str = "Cu3O") -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = Atoms(symbols, rng.normal(size=(4, 3)), cell=np.eye(3) * 6 + 0.3, pbc=True)
    atoms.set_constraint(FixAtoms([0, 2]))
    stress = rng.normal(size=6)
    results = {"energy": float(rng.normal()), "forces": rng.normal(size=(4, 3)), "stress": stress}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def frame(comment: str = "energy=-1.5", rows: str = "H 0 0 0\nH 0 0 0.74\n") -> str:
    return f"{len(rows.splitlines())}\n{comment}\n{rows}"


def saved(folder: Path, text: str, name: str = "a.xyz") -> Path:
    (folder / name).write_text(text)
    return folder / name


def same(a: Structure, b: Structure) -> None:
    for field in ("atomic_numbers", "positions", "cell", "pbc", "energy", "forces", "stress"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)
    assert a.info.keys() == b.info.keys()
    for key, value in a.info.items():
        np.testing.assert_array_equal(value, b.info[key], err_msg=key)


@pytest.mark.parametrize("name", ["a.extxyz", "a.xyz.xz", "a.traj", "a.json", "a.db"])
def test_labels_are_read_raw_from_every_format_that_holds_them(tmp_path, name):
    frames = [slab(seed) for seed in range(3)]
    ase.io.write(tmp_path / name, frames)
    dataset = read_structures(tmp_path / name, require=("energy", "forces", "stress"))
    assert dataset.report.labels == {"energy": 3, "forces": 3, "stress": 3}
    assert [s.name for s in dataset.structures] == [f"{name}[{i}]" for i in range(3)]
    assert dataset.elements == (8, 29)
    for structure, atoms in zip(dataset.structures, frames, strict=True):
        results = atoms.calc.results
        np.testing.assert_allclose(structure.energy, results["energy"], atol=1e-12)
        np.testing.assert_allclose(structure.forces, results["forces"], atol=1e-8)
        xx, yy, zz, yz, xz, xy = results["stress"]
        full = [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]
        np.testing.assert_allclose(structure.stress, full, atol=1e-12)
        np.testing.assert_array_equal(structure.info["fixed"], [True, False, True, False])
        assert (atoms.get_forces()[0] == 0).all()  # what ASE would have given
        assert (structure.forces[0] != 0).all()


@pytest.mark.parametrize("name", ["a.cif", "POSCAR", "a.vasp", "a.xsf"])
def test_structures_without_labels_are_read_when_no_label_is_required(tmp_path, name):
    bare = Atoms("NaCl", [[0, 0, 0], [2.8, 0, 0]], cell=np.eye(3) * 5.6, pbc=True)
    ase.io.write(tmp_path / name, bare, format="vasp" if name in ("POSCAR", "a.vasp") else None)
    dataset = read_structures(tmp_path / name, require=())
    (structure,) = dataset.structures
    np.testing.assert_allclose(structure.positions, bare.positions, atol=1e-6)
    assert (structure.energy, structure.forces, structure.stress) == (None, None, None)
    with pytest.raises(ValueError, match="no frame has energy under the key 'energy'"):
        read_structures(tmp_path / name)


def test_database_keys_and_data_are_label_sources(tmp_path):
    from ase.db import connect

    forces = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    with connect(tmp_path / "a.db") as rows:
        rows.write(Atoms("H2", [[0, 0, 0], [0, 0, 0.7]]), REF_energy=-3.0, data={"f_dft": forces})
    dataset = read_structures(tmp_path / "a.db", LabelKeys("REF_energy", "f_dft"))
    assert dataset.structures[0].energy == -3.0
    np.testing.assert_array_equal(dataset.structures[0].forces, forces)


@pytest.mark.parametrize(
    "name", ["a.pkl", "a.bundle", "a.npz", "a.py", "a.aselmdb", "a.html", "a.traj.xz", "structures"]
)
def test_other_formats_are_refused_by_name(tmp_path, name):
    saved(tmp_path, frame(), name)
    with pytest.raises(ValueError, match=r"unknown format; expected one of \*.extxyz|unpack it"):
        read_structures(tmp_path / name)


def test_an_object_array_in_a_trajectory_is_not_unpickled(tmp_path):
    ase.io.write(tmp_path / "good.traj", slab())
    content = (tmp_path / "good.traj").read_bytes()
    assert b'"float64"' in content
    hostile = content.replace(b'"float64"', b'"object" ')
    (tmp_path / "a.traj").write_bytes(hostile)
    with pytest.raises(ValueError, match="a.traj: damaged, truncated or not traj"):
        read_structures(tmp_path / "a.traj")


@pytest.mark.parametrize("name", ["a.traj", "a.json", "a.db", "OUTCAR", "vasprun.xml", "a.cif"])
def test_garbage_is_named_not_crashed_on(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00\x01 not what it says {")
    with pytest.raises(ValueError, match=f"{name}"):
        read_structures(tmp_path / name)


# Keys


REF = LabelKeys("REF_energy", "REF_forces", "REF_stress")
REF_FRAME = frame(
    'REF_energy=-2.0 energy=-1.0 REF_stress="1 2 3 4 5 6" Lattice="9 0 0 0 9 0 0 0 9" '
    "Properties=species:S:1:pos:R:3:REF_forces:R:3:forces:R:3",
    "H 0 0 0 1 2 3 7 7 7\nH 0 0 1 4 5 6 7 7 7\n",
)


def test_own_keys_are_read_and_other_labels_only_carried(tmp_path):
    dataset = read_structures(saved(tmp_path, REF_FRAME), REF)
    (structure,) = dataset.structures
    assert structure.energy == -2.0
    np.testing.assert_array_equal(structure.forces, [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(structure.stress, [[1, 6, 5], [6, 2, 4], [5, 4, 3]])
    assert structure.info["energy"] == -1.0
    assert dataset.report.unread == {"energy": 1, "forces": 1}


def test_a_required_label_under_another_key_raises_and_names_it(tmp_path):
    text = REF_FRAME.replace(" energy=-1.0", "").replace(":forces:", ":velo:")
    text = text.replace("REF_stress", "other")
    path = saved(tmp_path, text)
    with pytest.raises(ValueError, match=r"Keys there: REF_energy. Pass .*energy='REF_energy'"):
        read_structures(path)
    with pytest.raises(ValueError, match=r"no frame has forces .*forces='REF_forces'"):
        read_structures(path, LabelKeys("REF_energy"), require=("energy", "forces"))
    with pytest.warns(UserWarning, match="REF_forces is there and not read"):
        dataset = read_structures(path, LabelKeys("REF_energy"))
    assert dataset.structures[0].forces is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_structures(path, LabelKeys("REF_energy", None, None))  # asked not to read them


def test_labels_that_some_frames_lack_are_none_and_counted(tmp_path):
    text = frame() + frame("energy=0.0") + frame("charge=1")
    dataset = read_structures(saved(tmp_path, text))
    assert [s.energy for s in dataset.structures] == [-1.5, 0.0, None]
    assert dataset.report.labels == {"energy": 2, "forces": 0, "stress": 0}


@pytest.mark.parametrize("value", ["energy", "energy=None", 'energy="1 2"', "energy=T"])
def test_an_energy_that_is_no_number_raises(tmp_path, value):
    with pytest.raises(ValueError, match=r"a.xyz\[1\].*energy"):
        read_structures(saved(tmp_path, frame() + frame(value)))


def test_two_labels_from_one_key_are_refused():
    with pytest.raises(ValueError, match="two labels from one key"):
        LabelKeys(energy="x", forces="x")


def test_require_takes_labels_not_keys(tmp_path):
    with pytest.raises(ValueError, match="REF_energy.*are not labels"):
        read_structures(saved(tmp_path, frame()), require=("REF_energy",))


# Stress

CELL = 'Lattice="2 0 0 0 3 0 0 0 -4" energy=1'


def test_virial_becomes_minus_stress_times_volume(tmp_path):
    text = frame(f'{CELL} virial="24 12 0 12 48 0 0 0 0"')
    (structure,) = read_structures(saved(tmp_path, text), LabelKeys(virial="virial")).structures
    expected = [[-1, -0.5, 0], [-0.5, -2, 0], [0, 0, 0]]  # a left-handed cell has volume 24 too
    np.testing.assert_allclose(structure.stress, expected, rtol=1e-14)
    both = frame(f'{CELL} virial="24 12 0 12 48 0 0 0 0" stress="1 0.5 0 0.5 2 0 0 0 0"')
    with pytest.raises(ValueError, match="stress and -virial/volume disagree"):
        read_structures(saved(tmp_path, both), LabelKeys(virial="virial"))
    aperiodic = frame('energy=1 virial="24 12 0 12 48 0 0 0 0"')
    with pytest.raises(ValueError, match="needs a cell with volume"):
        read_structures(saved(tmp_path, aperiodic), LabelKeys(virial="virial"))


def test_an_asymmetric_stress_raises_although_ase_would_drop_half_of_it(tmp_path):
    path = saved(tmp_path, frame(f'{CELL} stress="1 2 3 9 5 6 3 6 9"'))
    assert ase.io.read(path).calc.results["stress"].shape == (6,)
    with pytest.raises(ValueError, match=r"a.xyz\[0\]: stress: the tensor is not symmetric"):
        read_structures(path)
    with pytest.raises(ValueError, match="6, 9 or 3x3 numbers"):
        read_structures(
            saved(tmp_path, frame(f'{CELL} s="1 2 3 4"')), LabelKeys(stress="s"), require=()
        )


# Bad frames


def test_bad_numbers_raise_or_are_counted_by_reason(tmp_path):
    text = (
        frame()
        + frame("energy=nan")
        + frame(rows="H 0 0 0\nH 0 0 inf\n")
        + frame("energy=nan")
        + frame(rows="X 0 0 0\n")
    )
    path = saved(tmp_path, text)
    with pytest.raises(ValueError, match=r"a.xyz\[1\]: energy holds NaN"):
        read_structures(path)
    report = read_structures(path, on_bad="skip").report
    assert (report.frames, report.kept) == (5, 1)
    assert sorted(left.count for left in report.left_out.values()) == [1, 1, 2]
    (energy,) = [left for reason, left in report.left_out.items() if "energy holds" in reason]
    assert energy.examples == ("a.xyz[1]", "a.xyz[3]")
    assert "left out 2: energy holds NaN" in str(report)
    with pytest.raises(ValueError, match="every frame was left out: energy holds NaN"):
        read_structures(saved(tmp_path, frame("energy=nan")), on_bad="skip")


FIXED_WIDTH = io.StringIO()
ase.io.write(FIXED_WIDTH, [slab(0), slab(1), slab(2)], format="extxyz")
FIXED_WIDTH = FIXED_WIDTH.getvalue()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("cut")


@given(st.integers(0, len(FIXED_WIDTH) - 1))
def test_a_file_cut_anywhere_raises_or_holds_whole_frames(scratch, end):
    whole = read_structures(saved(scratch, FIXED_WIDTH)).structures
    try:
        cut = read_structures(saved(scratch, FIXED_WIDTH[:end])).structures
    except ValueError as error:
        assert "a.xyz" in str(error)
    else:
        for a, b in zip(cut, whole, strict=False):
            same(a, b)
        assert len(cut) == FIXED_WIDTH[: end + 1].count("\n") // 6


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".bz2"])
@given(st.data())
def test_a_compressed_file_cut_anywhere_raises(scratch, suffix, data):
    content = COMPRESS[suffix](FIXED_WIDTH.encode())
    path = scratch / f"a.xyz{suffix}"
    path.write_bytes(content)
    assert len(read_structures(path)) == 3
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=f"a.xyz{suffix}"):
        read_structures(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (frame() + "2\nenergy=1\nH 0 0 0\n", r"a.xyz\[1\]: the file ends inside this frame of 2"),
        (frame() + "2\n", r"a.xyz\[1\]: the file ends inside"),
        (frame().replace("2", "1", 1) + frame(), r"a.xyz\[1\]: expected the number of atoms.*H 0"),
        (frame().replace("2", "3", 1) + frame(), r"a.xyz\[0\]: not a frame|\[1\]: expected"),
        (frame() + frame(rows="H 0 0\n"), r"a.xyz\[1\]: not a frame"),
        (frame() + frame(rows="H 0 0 1.2.3\n"), r"a.xyz\[1\]: not a frame"),
        (
            frame("Properties=species:S:1:pos:R:3 energy=1", "H 0 0 0 5 5 5\n"),
            r"a.xyz\[0\].*atom 0 has 7 columns, Properties asks for 4",
        ),
        (frame('energy=1 Lattice="1 0 0 0 1 0 0 0"'), r"a.xyz\[0\]: not a frame"),
        ("", "holds no frames"),
        ("hello\n", r"a.xyz\[0\]: expected the number of atoms, got 'hello'"),
    ],
)
def test_damaged_frames_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_structures(saved(tmp_path, text), on_bad="skip")


def test_an_empty_line_hides_no_frame(tmp_path):
    path = saved(tmp_path, frame() + "\n" + frame() + "\n\n")
    assert len(ase.io.read(path, ":")) == 1  # what ASE sees
    assert len(read_structures(path)) == 2


@pytest.mark.parametrize(
    ("index", "names"),
    [(-1, [4]), ("1:3", [1, 2]), (slice(None, None, 2), [0, 2, 4]), ("0", [0]), (":", range(5))],
)
def test_index_chooses_frames_which_keep_their_number(tmp_path, index, names):
    path = saved(tmp_path, "".join(frame(f"energy={i}") for i in range(5)))
    dataset = read_structures(path, index=index)
    assert [s.name for s in dataset.structures] == [f"a.xyz[{i}]" for i in names]
    assert [s.energy for s in dataset.structures] == list(names)
    with pytest.raises(ValueError, match="index 5 is outside the file's 5 frames"):
        read_structures(path, index=5)


def test_a_missing_file_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match=r"b.xyz is not a file"):
        read_structures(tmp_path / "b.xyz")


# Isolated atoms

ATOM = frame("energy=-13.5 config_type=IsolatedAtom", "H 0 0 0\n")


def test_marked_single_atoms_become_reference_energies(tmp_path):
    lone = frame("energy=-13.0", "H 0 0 0\n")
    other = frame("energy=-2041.5 config_type=isolated_atom", "O 0 0 0\n")
    dataset = read_structures(saved(tmp_path, ATOM + frame() + lone + other))
    assert dataset.isolated_atoms == {1: -13.5, 8: -2041.5}
    assert [s.name for s in dataset.structures] == ["a.xyz[1]", "a.xyz[2]"]
    assert (dataset.report.isolated_atoms, dataset.report.kept) == (2, 2)


def test_isolated_atoms_come_from_a_file_or_a_mapping_too(tmp_path):
    path = saved(tmp_path, frame())
    atoms = saved(tmp_path, ATOM.replace(" config_type=IsolatedAtom", ""), "atoms.xyz")
    assert read_isolated_atoms(atoms) == {1: -13.5}
    assert read_structures(path, isolated_atoms=atoms).isolated_atoms == {1: -13.5}
    assert read_structures(path, isolated_atoms={1: -2.0}).isolated_atoms == {1: -2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ATOM + ATOM.replace("13.5", "13.6"), "a second energy -13.6 eV for .* H, first -13.5"),
        (frame("energy=1 config_type=IsolatedAtom"), "one atom with an energy; got 2 atoms"),
        (ATOM.replace("energy=-13.5", ""), "one atom with an energy; got 1 atoms, energy None"),
    ],
)
def test_contradictory_isolated_atoms_raise(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_structures(saved(tmp_path, text))


# Writing


def finite(shape):
    return hnp.arrays(np.float64, shape, elements=st.floats(-1e6, 1e6))


@st.composite
def structures(draw):
    nodes = draw(st.integers(1, 4))
    stress = draw(st.none() | finite((3, 3)))
    tags = hnp.arrays(np.int64, nodes, elements=st.integers(0, 2))
    text = st.sampled_from(["a b", "T", "12", 'say "x"', "[1]", "", "ü", "_JSON 1"])
    info = {"note": text, "tags": tags, "spin": st.integers(-9, 9), "vector": finite((2, 2))}
    info |= {"fine": st.booleans(), "x": st.floats(-1, 1), "mask": hnp.arrays(bool, nodes)}
    carried = draw(st.fixed_dictionaries({}, optional=info))
    return Structure(
        atomic_numbers=draw(hnp.arrays(np.int64, nodes, elements=st.integers(1, 118))),
        positions=draw(finite((nodes, 3))),
        cell=np.diag([3.0, 4.0, 1 / 3]) + 0.1 if draw(st.booleans()) else np.zeros((3, 3)),
        energy=draw(st.none() | st.floats(-1e6, 1e6)),
        forces=draw(st.none() | finite((nodes, 3))),
        stress=None if stress is None else stress + stress.T,
        spin=float(carried.get("spin", 1)),
        info=carried,
    )


@pytest.mark.parametrize("suffix", list(COMPRESS))
@given(st.lists(structures(), min_size=1, max_size=3))
def test_written_structures_are_read_back_equal(scratch, suffix, originals):
    keys = LabelKeys("REF_energy", "REF_forces", "REF_stress")
    for k in (LabelKeys(), keys):
        path = scratch / f"written.xyz{suffix}"
        path.unlink(missing_ok=True)
        write_structures(path, originals, k)
        for a, b in zip(originals, read_structures(path, k, require=()).structures, strict=True):
            same(a, b)


def test_charge_spin_and_head_survive(tmp_path):
    atoms = Atoms("OH", [[0, 0, 0], [0, 0, 0.97]])
    atoms.info |= {"charge": -1, "spin": 2, "head": "mine", "note": "x"}
    named = Structure.from_atoms(atoms)
    write_structures(tmp_path / "a.xyz", [named, dataclasses.replace(named, charge=0.0)])
    first, second = read_structures(tmp_path / "a.xyz", require=()).structures
    assert (first.charge, first.spin, first.head) == (-1.0, 2.0, "mine")
    assert (second.charge, second.spin) == (0.0, 2.0)
    write_structures(tmp_path / "b.xyz", [first])  # as read, where info has them once more
    again = read_structures(tmp_path / "b.xyz", require=()).structures[0]
    assert again.state == first.state and again.info["charge"] == -1
    with pytest.raises(ValueError, match=r"info\['charge'\] would be taken for something else"):
        write_structures(tmp_path / "c.xyz", [dataclasses.replace(first, charge=1.0)])
    per_atom = dataclasses.replace(named, info={"charge": np.array([-0.5, -0.5])})
    with pytest.raises(ValueError, match=r"info\['charge'\] would be taken for something else"):
        write_structures(tmp_path / "c.xyz", [per_atom])


def test_a_periodic_structure_survives_and_ase_reads_it(tmp_path):
    ase.io.write(tmp_path / "a.xyz", slab())
    original = read_structures(tmp_path / "a.xyz").structures[0]
    original = dataclasses.replace(original, pbc=(True, False, True))
    write_structures(tmp_path / "b.xyz", [original])
    same(original, read_structures(tmp_path / "b.xyz").structures[0])
    atoms = ase.io.read(tmp_path / "b.xyz")
    np.testing.assert_array_equal(atoms.calc.results["forces"], original.forces)
    assert atoms.pbc.tolist() == [True, False, True]


def test_writing_is_all_or_nothing_and_overwrites_nothing(tmp_path):
    good = read_structures(saved(tmp_path, frame())).structures[0]
    with pytest.raises(ValueError, match="a.xyz exists. Nothing is overwritten"):
        write_structures(tmp_path / "a.xyz", [good])
    bad = {
        "cannot be written": {"thing": object()},
        "'Lattice'.*taken for something": {"Lattice": 1},
        "'energy'.*taken for something": {"energy": 1},
        "'line'": {"line": "two \nlines"},
    }
    for message, info in bad.items():
        with pytest.raises(ValueError, match=message):
            write_structures(tmp_path / "b.xyz", [good, dataclasses.replace(good, info=info)])
    with pytest.raises(ValueError, match="has energy, and no key"):
        write_structures(tmp_path / "b.xyz", [good], LabelKeys(energy=None))
    with pytest.raises(ValueError, match=r"written as .xyz"):
        write_structures(tmp_path / "b.traj", [good])
    assert os.listdir(tmp_path) == ["a.xyz"]


def test_energy_reference_and_level_are_carried(tmp_path):
    dataset = read_structures(
        saved(tmp_path, frame()),
        energy_reference=EnergyReference.ADSORPTION,
        level_of_theory="RPBE",
        name="mine",
    )
    assert (dataset.energy_reference, dataset.level_of_theory) == ("adsorption", "RPBE")
    assert dataset.name == "mine"
