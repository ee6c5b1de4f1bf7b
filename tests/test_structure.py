"""Structures keep what they are given and refuse what cannot be right."""

import dataclasses

import ase
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from jaxtyping import TypeCheckError

from equizoo.structure import EnergyReference, Structure, require_same_reference, spread

WATER = {
    "atomic_numbers": np.array([8, 1, 1]),
    "positions": np.array([[0.0, 0.0, 0.1], [0.0, 0.8, -0.5], [0.0, -0.8, -0.5]]),
    "cell": np.zeros((3, 3)),
}


def test_absent_labels_are_absent():
    structure = Structure(**WATER)
    assert structure.num_nodes == 3
    assert structure.energy is structure.forces is structure.stress is None
    assert structure.to_atoms().calc is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atomic_numbers": np.array([], int), "positions": np.zeros((0, 3))}, "has no atoms"),
        ({"atomic_numbers": np.array([8, 1, 0])}, "1..118"),
        ({"atomic_numbers": np.array([8, 1, 119])}, "1..118"),
        ({"positions": np.full((3, 3), np.nan)}, "positions holds NaN"),
        ({"forces": np.full((3, 3), np.inf)}, "forces holds NaN or infinity"),
        ({"energy": float("nan")}, "energy holds NaN"),
        ({"pbc": (True, True, True)}, "zero volume"),
        ({"pbc": (False, True, True), "cell": np.ones((3, 3))}, "parallel"),
        ({"name": "a.xyz[7]", "energy": float("inf")}, r"a\.xyz\[7\]"),
    ],
)
def test_what_cannot_be_right_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Structure(**(WATER | change))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_cell_with_volume_is_accepted_whatever_its_size(scale):
    cell = scale * np.array([[1.0, 0, 0], [0.9, 0.1, 0], [0, 0, 0]])
    Structure(**(WATER | {"cell": cell, "pbc": (True, True, False)}))


def test_atoms_round_trip_with_labels():
    stress = np.array([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    structure = Structure(
        **(WATER | {"cell": np.diag([4.0, 5, 6]), "pbc": (True, False, True)}),
        energy=-3.5,
        forces=np.arange(9.0).reshape(3, 3),
        stress=stress,
    )
    atoms = structure.to_atoms()
    assert atoms.get_potential_energy() == -3.5
    np.testing.assert_array_equal(atoms.get_forces(), structure.forces)
    np.testing.assert_array_equal(atoms.get_stress(voigt=False), stress)
    back = Structure.from_atoms(atoms, name="again")
    for field in ("atomic_numbers", "positions", "cell"):
        np.testing.assert_array_equal(getattr(back, field), getattr(structure, field))
    assert back.pbc == structure.pbc and back.name == "again"


def test_results_of_a_calculator_are_not_taken_for_labels():
    atoms = ase.Atoms("H")
    atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    assert Structure.from_atoms(atoms).energy is None


def test_charge_spin_and_head_pass_through_atoms_info():
    atoms = ase.Atoms("H")
    assert Structure.from_atoms(atoms).to_atoms().info == {}
    atoms.info = {"charge": -1, "spin": np.int64(3), "head": "omol", "other": 5}
    structure = Structure.from_atoms(atoms)
    assert (structure.charge, structure.spin, structure.head) == (-1.0, 3.0, "omol")
    again = Structure.from_atoms(structure.to_atoms())
    assert (again.charge, again.spin, again.head) == (-1.0, 3.0, "omol")


@pytest.mark.parametrize("value", ["+1", None, np.ones(3), float("nan"), True])
def test_what_is_no_charge_is_left_alone(value):
    """A file may keep something of its own under these keys."""
    atoms = ase.Atoms("H")
    atoms.info = {"charge": value, "spin": value, "head": 3}
    structure = Structure.from_atoms(atoms)
    assert (structure.charge, structure.spin, structure.head) == (0.0, 1.0, None)


def test_from_atoms_copies():
    atoms = ase.Atoms("H")
    structure = Structure.from_atoms(atoms)
    atoms.positions += 1
    np.testing.assert_array_equal(structure.positions, 0)


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("positions", (2, 3)),
        ("positions", (3, 2)),
        ("cell", (3,)),
        ("forces", (3,)),
        ("stress", (6,)),
    ],
)
def test_arrays_of_another_shape_are_refused_in_altered_copies_too(field, shape):
    # checked annotations, where they are switched on, speak first
    with pytest.raises((ValueError, TypeCheckError), match=field):
        dataclasses.replace(Structure(**WATER), **{field: np.zeros(shape)})


def test_two_energy_references_are_never_mixed():
    require_same_reference(EnergyReference.TOTAL, EnergyReference("total"), "training")
    with pytest.raises(ValueError, match="training would mix .* 'total' and 'adsorption'"):
        require_same_reference(EnergyReference.TOTAL, EnergyReference.ADSORPTION, "training")


def test_a_few_of_many_are_spread_evenly():
    assert spread(range(101), 5) == [0, 25, 50, 75, 100]
    assert spread("ab", 5) == ["a", "b"] and spread([], 3) == [] and spread([7, 8], 0) == []
