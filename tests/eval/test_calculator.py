import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.constraints import FixAtoms
from ase.md.langevin import Langevin
from ase.stress import full_3x3_to_voigt_6_stress
from models import ENERGIES, cluster, crystal, pair_potential


def simulate(atoms, steps, temperature):
    """The largest and smallest numbers of edges along a trajectory."""
    rng = np.random.default_rng(0)
    dynamics = Langevin(
        atoms,
        1.0 * units.fs,
        temperature_K=temperature,
        friction=0.05 / units.fs,
        fixcm=False,
        rng=rng,
    )
    potential, edges = atoms.calc.potential, []
    dynamics.attach(lambda: edges.append(potential.frame(atoms).num_edges))
    dynamics.run(steps)
    return min(edges), max(edges)


@pytest.mark.parametrize("kind", ["crystal", "molecule"])
def test_two_hundred_steps_compile_at_most_twice(kind):
    if kind == "crystal":
        atoms = bulk("C", "diamond", a=3.57, cubic=True) * (2, 2, 2)
    else:
        atoms = cluster(np.random.default_rng(1), 30)
    atoms.calc = pair_potential(cutoff=2.6).calculator()
    fewest, most = simulate(atoms, 200, temperature=1500)
    assert most > fewest
    assert 1 <= atoms.calc.potential.num_programs <= 2


def test_growing_density_compiles_logarithmically():
    atoms = crystal(np.random.default_rng(2), 2, 2.2)
    atoms.calc = pair_potential().calculator()
    for _ in range(40):
        atoms.set_cell(atoms.cell.array * 0.985, scale_atoms=True)
        atoms.get_potential_energy()
    assert atoms.calc.potential.num_programs <= 8


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_agrees_with_predict(dtype):
    potential = pair_potential()
    calculator = potential.calculator(dtype)
    for atoms in (crystal(np.random.default_rng(3)), cluster(np.random.default_rng(4), 12)):
        atoms.calc = calculator
        result = potential.predict(atoms, dtype=dtype)
        tolerance = 1e-5 if dtype == "float32" else 1e-12
        assert atoms.get_potential_energy() == pytest.approx(result.energy, abs=tolerance)
        assert atoms.calc.results["free_energy"] == atoms.get_potential_energy()
        np.testing.assert_allclose(atoms.get_forces(), result.forces, atol=tolerance)
        np.testing.assert_allclose(
            atoms.get_potential_energies(), result.node_energies, atol=tolerance
        )
        if atoms.pbc.all():
            voigt = full_3x3_to_voigt_6_stress(result.stress)
            np.testing.assert_allclose(atoms.get_stress(), voigt, atol=tolerance)


def test_no_stress_without_a_cell():
    atoms = cluster(np.random.default_rng(5), 4)
    atoms.calc = pair_potential().calculator()
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


def test_atoms_without_neighbours():
    atoms = Atoms("CO", [[0, 0, 0], [0, 0, 50.0]])
    atoms.calc = pair_potential().calculator()
    assert atoms.get_potential_energy() == ENERGIES[6] + ENERGIES[8]
    assert not atoms.get_forces().any()


def test_results_follow_the_atoms():
    atoms = cluster(np.random.default_rng(6), 10)
    atoms.calc = pair_potential().calculator()
    before = atoms.get_potential_energy()
    atoms.positions[0] += 0.3
    assert atoms.get_potential_energy() != before
    atoms.set_constraint(FixAtoms([0]))
    assert not atoms.get_forces()[0].any()
    assert atoms.get_forces(apply_constraint=False)[0].any()


def test_two_structures_in_turn_keep_their_programs():
    potential = pair_potential()
    calculator = potential.calculator()
    small, large = (cluster(np.random.default_rng(7), n) for n in (5, 40))
    for _ in range(3):
        for atoms in (small, large):
            atoms.calc = calculator
            atoms.rattle(0.001)
            atoms.get_forces()
    assert potential.num_programs == 2


def test_calculators_of_one_potential_share_programs():
    potential = pair_potential()
    for seed in (1, 2):
        atoms = cluster(np.random.default_rng(8), 10)
        atoms.calc = potential.calculator()
        atoms.rattle(1e-4, seed=seed)
        atoms.get_forces()
    assert potential.num_programs == 1


def test_charge_spin_and_head_count_as_changes(monkeypatch):
    potential, evaluated = pair_potential(), []
    original = potential.evaluate_batch
    monkeypatch.setattr(
        potential, "evaluate_batch", lambda *args: evaluated.append(1) or original(*args)
    )
    atoms = cluster(np.random.default_rng(8), 5)
    atoms.calc = potential.calculator()
    for change in ({}, {"charge": 1}, {"charge": 1.0}, {"spin": 2}, {"note": "mine"}):
        atoms.info |= change
        atoms.get_potential_energy()
    assert len(evaluated) == 3  # the first, another charge, another spin
