"""Each fault, put into data that are right, is found with its count; without it nothing is."""

import dataclasses

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.units import Bohr, GPa, Hartree, kcal, mol
from scipy.spatial.transform import Rotation

from equizoo.data import LabelKeys, doctor, load_dataset, read_structures, write_structures
from equizoo.data.datasets import list_datasets
from equizoo.data.doctor import examine
from equizoo.data.doctor_duplicates import find_pairs
from equizoo.data.doctor_elements import all_electron_energies
from equizoo.data.doctor_findings import Verdict
from equizoo.data.doctor_frames import measure
from equizoo.data.prepare import prepare
from equizoo.data.readers import Dataset, ReadReport
from equizoo.structure import EnergyReference, Structure


def dataset(structures, name="made up", **options) -> Dataset:
    structures = tuple(
        s if s.name else dataclasses.replace(s, name=f"{name}[{i}]")
        for i, s in enumerate(structures)
    )
    counts = {
        label: sum(getattr(s, label) is not None for s in structures)
        for label in ("energy", "forces", "stress")
    }
    report = ReadReport(len(structures), len(structures), 0, counts, {}, {})
    fields = {"energy_reference": EnergyReference.TOTAL, "level_of_theory": ""}
    fields |= {"isolated_atoms": {}}
    return Dataset(structures, report=report, name=name, **fields | options)


def changed(data: Dataset, change) -> Dataset:
    """The data with every structure replaced by fields that ``change`` returns for it."""
    structures = [dataclasses.replace(s, **change(s)) for s in data.structures]
    return dataclasses.replace(data, structures=tuple(structures))


def found(diagnosis, check, verdict):
    return [f for f in diagnosis.findings if f.check == check and f.verdict == verdict]


def one(diagnosis, check, verdict=Verdict.ERROR):
    (finding,) = found(diagnosis, check, verdict)
    return finding


@pytest.fixture(scope="module")
def molecules() -> Dataset:
    return load_dataset("formamide/train", index=":200")


def emt_frame(atoms: Atoms) -> Structure:
    atoms.calc = EMT()
    stress = atoms.get_stress(voigt=False) if all(atoms.pbc) else None
    return dataclasses.replace(
        Structure.from_atoms(atoms),
        energy=float(atoms.get_potential_energy()) - 3.5 * len(atoms),  # as bound as metals are
        forces=atoms.get_forces(apply_constraint=False),
        stress=stress,
    )


@pytest.fixture(scope="module")
def metal() -> Dataset:
    """Strained and shaken copper with the forces and stress of its energy."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(60):
        atoms = bulk("Cu", cubic=True)
        strain = rng.normal(scale=0.02, size=(3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (strain + strain.T)), True)
        atoms.rattle(0.02, rng=rng)
        frames.append(emt_frame(atoms))
    return dataset(frames)


def test_clean_data_have_neither_errors_nor_warnings(molecules, metal):
    test = load_dataset("formamide/test")
    diagnosis = examine(molecules, against=[test])
    assert diagnosis.errors == diagnosis.warnings == ()
    assert "1.0" in one(diagnosis, "forces against energies", Verdict.FINE).message
    diagnosis = examine(metal)
    assert diagnosis.errors == diagnosis.warnings == ()
    for check in ("forces", "stress"):
        verdicts = [f.verdict for f in diagnosis.findings if f.check == f"{check} against energies"]
        assert verdicts == [Verdict.FINE if check == "stress" else Verdict.CANNOT_TELL]
    assert one(diagnosis, "order of stress components", Verdict.FINE)


def test_a_diagnosis_is_sorted_and_plain(molecules):
    diagnosis = examine(changed(molecules, lambda s: {"forces": -s.forces}))
    verdicts = [finding.verdict for finding in diagnosis.findings]
    assert verdicts == sorted(verdicts, key=list(Verdict).index)
    plain = diagnosis.to_dict()
    assert plain["frames"] == 200 and plain["counts"]["error"] == 1
    assert plain["findings"][0]["check"] == "forces against energies"
    assert plain["findings"][0]["examples"][0].startswith("train.xyz")


# ---- units and signs


@pytest.mark.parametrize(
    ("energy", "forces", "words"),
    [
        (1, -1, "wrong sign"),
        (1 / Hartree, 1, "energies in hartree"),
        (1, Bohr / Hartree, "forces in hartree/bohr"),
        (1 / Hartree, Bohr / Hartree, "forces per bohr"),
        (mol / kcal, 1, "energies in kcal/mol"),
        (1, mol / kcal, "forces in kcal/mol/Å"),
        (1, -mol / kcal, "wrong sign"),
        (1000, 1, "energies in meV"),
        (1 / 6, 1, "per atom"),
    ],
)
def test_units_and_signs_of_forces_and_energies(molecules, energy, forces, words):
    data = changed(molecules, lambda s: {"energy": s.energy * energy, "forces": s.forces * forces})
    finding = one(examine(data), "forces against energies")
    assert words in finding.fix and finding.count >= 8


@pytest.mark.parametrize(("unit", "words"), [(1 / Bohr, "bohr"), (0.1, "nm")])
def test_units_of_positions(molecules, unit, words):
    data = changed(molecules, lambda s: {"positions": s.positions * unit})
    finding = one(examine(data), "distances")
    assert finding.count == 200 and words in finding.fix


def test_energies_of_all_electrons_in_hartree_even_if_forces_agree(molecules):
    data = changed(
        molecules, lambda s: {"energy": s.energy / Hartree, "forces": s.forces / Hartree}
    )
    diagnosis = examine(data)
    assert "hartree" in one(diagnosis, "energy scale").message
    assert one(diagnosis, "forces against energies", Verdict.FINE)
    # [hartree] Chakravorty et al. 1993
    exact = {1: -0.5, 5: -24.654, 6: -37.845, 8: -75.067, 17: -460.148}
    numbers = np.array(list(exact))
    ratio = all_electron_energies(numbers) / Hartree / list(exact.values())
    np.testing.assert_allclose(ratio, 1, atol=0.02)


def test_labels_of_other_frames_are_noticed(metal):
    """Shaken crystals in one cell, near enough to know; energies in another order."""
    rng = np.random.default_rng(1)
    start = bulk("Cu", cubic=True)
    start.rattle(0.1, rng=rng)
    frames = []
    for _ in range(60):
        atoms = start.copy()
        atoms.rattle(0.02, rng=rng)
        frames.append(emt_frame(atoms))
    assert one(examine(dataset(frames)), "forces against energies", Verdict.FINE)
    mixed = [
        dataclasses.replace(s, energy=other.energy)
        for s, other in zip(frames, frames[7:] + frames[:7], strict=True)
    ]
    finding = one(examine(dataset(mixed)), "forces against energies")
    assert "do not change as forces say" in finding.message and finding.count >= 20


def test_few_or_distant_frames_cannot_tell(molecules):
    few = dataclasses.replace(molecules, structures=molecules.structures[:3])
    finding = one(examine(few), "forces against energies", Verdict.CANNOT_TELL)
    assert "near each other" in finding.message


@pytest.mark.parametrize(
    ("factor", "words"),
    [(-1, "wrong sign"), (1 / GPa, "in GPa"), (-10 / GPa, "in kbar, compression positive")],
)
def test_unit_and_sign_of_stress(metal, factor, words):
    finding = one(
        examine(changed(metal, lambda s: {"stress": s.stress * factor})), "stress against energies"
    )
    assert words in finding.fix and finding.count >= 8


def test_a_virial_read_as_stress(metal):
    volume = [abs(np.linalg.det(s.cell)) for s in metal.structures]
    assert max(volume) / min(volume) > 1.1
    data = changed(metal, lambda s: {"stress": -s.stress * abs(np.linalg.det(s.cell))})
    assert "-virial / volume" in one(examine(data), "stress against energies").fix


def test_order_of_stress_components(metal):
    def in_order_of_vasp(s):
        (xx, xy, xz), (_, yy, yz), (_, _, zz) = s.stress  # file: xx yy zz xy yz zx
        return {"stress": np.array([[xx, xz, yz], [xz, yy, xy], [yz, xy, zz]])}

    data = changed(metal, in_order_of_vasp)
    finding = one(examine(data), "order of stress components")
    assert "xy, yz, xz" in finding.message
    assert "VASP" in finding.fix


# ---- labels


def test_labels_under_other_keys(molecules, tmp_path):
    path = tmp_path / "frames.xyz"
    write_structures(path, molecules.structures[:20], LabelKeys(energy="energy", forces="REF_F"))
    with pytest.warns(UserWarning, match="REF_F is there and not read"):
        data = read_structures(path)
    finding = one(examine(data), "unread labels")
    assert finding.count == 20 and "--forces-key REF_F" in finding.fix
    asked = read_structures(path, LabelKeys(forces=None))
    assert one(examine(asked, keys=LabelKeys(forces=None)), "unread labels", Verdict.NOTE)
    right = LabelKeys(forces="REF_F")
    assert not found(examine(read_structures(path, right), keys=right), "labels", Verdict.ERROR)


def test_two_energies_of_which_one_is_read(molecules):
    def with_second(factor, shift):
        return changed(
            molecules, lambda s: {"info": {"dft_energy": factor * s.energy + shift * len(s.name)}}
        )

    same, hartree = examine(with_second(1, 0)), examine(with_second(1 / Hartree, 0))
    assert "is the same" in one(same, "unread labels", Verdict.NOTE).message
    assert "27.21" in one(hartree, "unread labels", Verdict.NOTE).message
    other = one(examine(with_second(1, 0.7)), "unread labels", Verdict.WARNING)
    assert other.count == 200 and "differs" in other.message


def test_unreadable_frames_are_counted_by_reason(molecules, tmp_path):
    path = tmp_path / "frames.xyz"
    write_structures(path, molecules.structures[:5])
    text = path.read_text().splitlines(keepends=True)
    text[3] = " ".join([*text[3].split()[:-1], "nan"]) + "\n"
    path.write_text("".join(text))
    finding = one(examine(read_structures(path, on_bad="skip")), "unreadable frames")
    assert (
        finding.count == 1 and "NaN" in finding.message and finding.examples == ("frames.xyz[0]",)
    )


def test_zeros_in_place_of_labels(molecules, metal):
    def without(s):
        some = s.name.endswith("3]")
        return {"forces": np.zeros_like(s.forces), "energy": 0.0} if some else {}

    diagnosis = examine(changed(molecules, without))
    count = sum(s.name.endswith("3]") for s in molecules.structures)
    assert one(diagnosis, "zeroed forces").count == count
    assert one(diagnosis, "zeroed energies").count == count
    diagnosis = examine(changed(metal, lambda s: {"stress": np.zeros((3, 3))}))
    assert one(diagnosis, "zeroed stresses").count == 60


def test_zeros_by_symmetry_are_none_of_a_constraint():
    perfect = []
    for i, size in enumerate(np.linspace(3.4, 3.8, 12)):
        frame = emt_frame(bulk("Cu", a=size, cubic=True))
        forces = np.zeros((4, 3)) if i % 2 else frame.forces
        perfect.append(dataclasses.replace(frame, forces=forces))
    assert not examine(dataset(perfect)).errors


def test_forces_that_a_constraint_has_zeroed():
    """As ASE writes them: get_forces() of atoms with FixAtoms."""
    rng = np.random.default_rng(0)
    frames, raw = [], []
    for _ in range(12):
        atoms = bulk("Cu", cubic=True).repeat((1, 1, 3))
        atoms.rattle(0.1, rng=rng)
        atoms.set_constraint(FixAtoms(range(4)))
        raw.append(emt_frame(atoms))
        frames.append(dataclasses.replace(raw[-1], forces=atoms.get_forces()))
    finding = one(examine(dataset(frames)), "zeroed forces")
    assert finding.count == 12 and "48 atoms" in finding.message
    assert "apply_constraint=False" in finding.fix
    assert not examine(dataset(raw)).errors


# ---- elements and energies


def test_what_compositions_do_not_tell_apart(molecules):
    bare = dataclasses.replace(molecules, isolated_atoms={})
    finding = one(examine(bare), "reference energies", Verdict.WARNING)
    assert finding.count == 4 and "H, C, N, O" in finding.message
    assert one(examine(molecules), "reference energies", Verdict.NOTE)
    some = dataclasses.replace(molecules, isolated_atoms={1: -13.6})
    lacking = found(examine(some), "reference energies", Verdict.WARNING)
    assert any("none of C, N, O" in finding.message for finding in lacking)


def test_energies_too_small_for_totals(molecules):
    data = changed(molecules, lambda s: {"energy": s.energy - molecules.structures[0].energy})
    assert one(examine(data), "energy scale", Verdict.WARNING).count >= 199
    other = dataclasses.replace(data, energy_reference=EnergyReference.ATOMISATION)
    assert one(examine(other), "energy scale", Verdict.FINE)


def test_outliers(molecules):
    stray, frame = molecules.structures[7], molecules.structures[9]
    odd = {stray.name: {"energy": -4600.0}}
    forces = frame.forces.copy()
    forces[:2] += [[900.0, 0, 0], [-900.0, 0, 0]]
    odd[frame.name] = {"forces": forces}
    finding_names = [
        f.examples for f in found(
            examine(changed(molecules, lambda s: odd.get(s.name, {}))), "outliers", Verdict.WARNING
        )
    ]  # fmt: skip
    assert finding_names == [(stray.name,), (frame.name,)]


# ---- frames


def test_net_forces_and_torques(molecules):
    chosen = {s.name for s in molecules.structures[3:5]}

    def pulled(s):
        return {"forces": s.forces + 0.1} if s.name in chosen else {}

    finding = one(examine(changed(molecules, pulled)), "net force", Verdict.WARNING)
    assert finding.count == 2 and set(finding.examples) == chosen
    turn = Rotation.from_euler("xyz", [30, 40, 50], degrees=True).as_matrix()
    turned = examine(changed(molecules, lambda s: {"forces": s.forces @ turn}))
    assert "orientation" in one(turned, "net torque").fix


def test_contacts_lone_atoms_and_fragments(molecules):
    close, alone, apart = (molecules.structures[i] for i in (0, 1, 2))
    near = close.positions.copy()
    near[1] = near[0] + [0.2, 0, 0]
    gone = alone.positions.copy()
    gone[-1] += 50
    split = apart.positions.copy()
    split[-2:] += 50
    moved = {close.name: near, alone.name: gone, apart.name: split}
    data = changed(molecules, lambda s: {"positions": moved[s.name]} if s.name in moved else {})
    diagnosis = examine(data)
    warnings = {f.message.split(" ")[2]: f for f in found(diagnosis, "distances", Verdict.WARNING)}
    assert [f.examples for f in warnings.values()] == [(close.name,), (alone.name,)]
    fragments = one(diagnosis, "distances", Verdict.NOTE)
    assert fragments.count == 2 and fragments.examples == (alone.name, apart.name)


# ---- duplicates and leakage


def disguised(structure: Structure, seed: int = 0, reflect: bool = True) -> Structure:
    """The same structure turned, reflected, moved and with its atoms in another order."""
    rng = np.random.default_rng(seed)
    turn = Rotation.random(random_state=seed).as_matrix() * (-1 if reflect else 1)
    order = rng.permutation(structure.num_nodes)
    fractions = rng.normal(size=3)
    forces = structure.forces
    return dataclasses.replace(
        structure,
        atomic_numbers=structure.atomic_numbers[order],
        positions=np.round((structure.positions[order] + fractions) @ turn, 5),
        cell=structure.cell @ turn,
        forces=None if forces is None else forces[order] @ turn,
        stress=None if structure.stress is None else turn.T @ structure.stress @ turn,
        name=f"disguised {structure.name}",
    )


def supercell(structure: Structure) -> Structure:
    """The same crystal in a doubled, skewed cell."""
    shape = np.array([[1, 0, 0], [1, 2, 0], [0, 0, 1]])
    copies = [structure.positions + k * structure.cell[1] for k in range(2)]
    return Structure(
        np.tile(structure.atomic_numbers, 2),
        np.concatenate(copies),
        shape @ structure.cell,
        structure.pbc,
        energy=2 * structure.energy,
    )


def test_duplicates_by_symmetry(molecules):
    frames = molecules.structures[:50]
    again = [disguised(s, i, bool(i % 2)) for i, s in enumerate(frames[:6])]
    copy = dataclasses.replace(frames[10], name="copy")
    finding = one(
        examine(dataset([*frames, *again, copy], isolated_atoms=molecules.isolated_atoms)),
        "duplicates",
        Verdict.WARNING,
    )
    assert finding.count == 7 and "1 with the same positions, 6 by symmetry" in finding.message
    contradicting = dataclasses.replace(again[0], energy=again[0].energy + 1.0)
    both = found(examine(dataset([*frames, contradicting])), "duplicates", Verdict.WARNING)
    assert [f.count for f in both] == [1, 1] and "energies that differ" in both[1].message


def test_leakage_by_symmetry_lattice_and_supercell(metal, molecules):
    test = [disguised(metal.structures[3]), supercell(metal.structures[5])]
    shifted = dataclasses.replace(
        metal.structures[8], positions=metal.structures[8].positions + metal.structures[8].cell[0]
    )
    far = dataclasses.replace(
        metal.structures[9], positions=metal.structures[9].positions + 0.05 * np.eye(4, 3)
    )
    diagnosis = examine(metal, against=[dataset([*test, shifted, far], "test")])
    finding = one(diagnosis, "leakage into test")
    assert finding.count == 3 and "3 of its 4 frames" in finding.message
    assert finding.examples[0].startswith("disguised made up[3] = made up[3]")
    unseen = one(examine(metal, against=[molecules]), f"elements of {molecules.name}")
    assert unseen.count == 200 and "H, C, N, O" in unseen.message


def test_crystals_with_equal_distances_are_told_apart():
    """Two arrangements on a lattice where every pair of elements is as often at every distance."""
    frames = [binary(code) for code in (HOMOMETRIC[0], HOMOMETRIC[1])]
    facts = [measure(frame, 5.0) for frame in frames]
    np.testing.assert_allclose(facts[0].fingerprint, facts[1].fingerprint, atol=1e-10)
    assert find_pairs(frames, facts)[0] == []
    turned = [frames[0], disguised(frames[0])]
    assert len(find_pairs(turned, [measure(frame, 5.0) for frame in turned])[0]) == 1


HOMOMETRIC = ((4, 5, 6, 7, 8, 10), (0, 1, 4, 7, 9, 15))  # of 16 sites


def binary(sites) -> Structure:
    atoms = bulk("Mo", a=3.2, cubic=True).repeat(2)
    numbers = np.where(np.isin(np.arange(16), sites), 73, 42)
    return dataclasses.replace(Structure.from_atoms(atoms), atomic_numbers=numbers)


def test_molecules_with_a_mirror_image_and_on_a_line():
    water, line = (Structure.from_atoms(molecule(name)) for name in ("H2O2", "C2H2"))
    for structure in (water, line):
        pair = [structure, disguised(structure)]
        assert len(find_pairs(pair, [measure(s, 5.0) for s in pair])[0]) == 1


# ---- real data


@pytest.mark.parametrize("name", ["acac/train_300K", "mlearn/Si_train"])
def test_real_data_pass(name):
    if list_datasets(name)[0].where not in ("local", "cached"):
        pytest.skip(f"{name} is not in EQUIZOO_DATA")
    diagnosis = examine(load_dataset(name))
    assert diagnosis.errors == ()
    assert one(diagnosis, "forces against energies", Verdict.FINE)
    if name.startswith("mlearn"):
        assert one(diagnosis, "stress against energies", Verdict.FINE)
        assert one(diagnosis, "duplicates", Verdict.WARNING).count == 40


def test_prepared_data_are_looked_at_by_sample_once_they_are_large(
    molecules, tmp_path, monkeypatch
):
    small = dataclasses.replace(molecules, structures=molecules.structures[:60])
    write_structures(tmp_path / "a.xyz", small.structures)
    folder = prepare([tmp_path / "a.xyz"], tmp_path / "prepared")
    whole = examine(folder)
    assert not found(whole, "sample", Verdict.NOTE) and whole.frames == 60
    monkeypatch.setattr(doctor, "_SAMPLE", 25)
    sampled = examine(folder, against=[folder])
    assert "20 of 60 frames" in one(sampled, "sample", Verdict.NOTE).message
    assert sampled.frames == 60
    leak = one(sampled, f"leakage into {folder.name}")
    assert leak.count == 20


def test_labels_are_counted_over_the_frames_looked_at(molecules, tmp_path, monkeypatch):
    some = [
        s if index % 2 else dataclasses.replace(s, forces=None)
        for index, s in enumerate(molecules.structures[:60])
    ]
    write_structures(tmp_path / "a.xyz", some)
    folder = prepare([tmp_path / "a.xyz"], tmp_path / "prepared")
    monkeypatch.setattr(doctor, "_SAMPLE", 25)  # less than the 30 that have forces
    assert "10 of 20 frames have no forces" in one(examine(folder), "labels", Verdict.NOTE).message


def test_a_file_of_reference_energies_alone_is_no_crash(tmp_path):
    atom = Atoms("H", info={"config_type": "IsolatedAtom", "energy": -13.6})
    ase.io.write(tmp_path / "e0.xyz", [atom])
    diagnosis = examine(read_structures(tmp_path / "e0.xyz", require=()))
    assert "single atoms" in one(diagnosis, "frames", Verdict.WARNING).message
