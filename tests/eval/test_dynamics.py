"""Batched dynamics against ASE's integrator, and against itself with other lists and batches."""

import dataclasses

import numpy as np
import pytest
from ase import units
from ase.md.verlet import VelocityVerlet
from models import cluster, crystal, mace_potential, pair_potential

from equizoo.eval.dynamics import NVE, Langevin, Trajectory, _velocities, drift, simulate
from equizoo.eval.potential import Potential
from equizoo.neighbors import NeighborLimit
from equizoo.structure import EnergyReference, Structure

HOT = 2000.0  # [K] so that neighbours change within a few steps
ROUNDING = 1e-9  # [eV] over some tens of steps in float64


@pytest.fixture(scope="module")
def pair():
    return pair_potential()


@pytest.fixture(scope="module")
def structures():
    rng = np.random.default_rng(0)
    return [Structure.from_atoms(a) for a in (cluster(rng, 9), crystal(rng), cluster(rng, 4))]


def run(potential, structures, **options) -> Trajectory:
    given = dict(timestep=1.0, picoseconds=0.04, dtype="float64")
    return simulate(potential, structures, NVE(HOT), **(given | options))


def test_the_trajectory_is_that_of_another_integrator(pair, structures):
    found = run(pair, structures)
    rng = np.random.default_rng(0)
    for index, structure in enumerate(structures):
        atoms = structure.to_atoms()
        atoms.set_velocities(_velocities(structure, HOT, rng))
        atoms.calc = pair.calculator("float64")
        energies, spins = [], []
        dynamics = VelocityVerlet(atoms, timestep=1.0 * units.fs)
        dynamics.attach(lambda a=atoms, e=energies: e.append(a.get_total_energy()))
        dynamics.attach(lambda a=atoms, s=spins: s.append(a.get_angular_momentum()))
        dynamics.run(40)
        expected = np.array(energies) - sum(
            pair.reference_energies[z] for z in structure.atomic_numbers.tolist()
        )
        assert np.ptp(expected) > 1e3 * ROUNDING, "the energy of a finite step does fluctuate"
        np.testing.assert_allclose(found.energy[:, index], expected, rtol=0, atol=ROUNDING)
        hbar = 6.582119569e-16 * units.s  # [eV s]
        np.testing.assert_allclose(
            found.angular_momentum[:, index], np.array(spins) / hbar, rtol=0, atol=1e-6
        )
        if not any(structure.pbc):
            kept = found.angular_momentum[:, index] - found.angular_momentum[0, index]
            assert np.abs(kept).max() < 1e-7 < np.abs(found.angular_momentum[0, index]).max()


def test_it_does_not_matter_when_lists_are_made(pair, structures):
    often, seldom = (run(pair, structures, skin=skin) for skin in (0.25, 1.5))
    assert often.num_lists > 2 * seldom.num_lists and often.finished
    np.testing.assert_allclose(often.energy, seldom.energy, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(often.stretch, seldom.stretch, rtol=1e-9)


def test_a_model_with_derivatives_through_neighbours_sees_only_its_cutoff(structures):
    """The way back of a gather leaves out the pairs beyond the cutoff too."""
    potential = mace_potential()
    narrow, wide = (
        run(potential, structures[:2], skin=skin, picoseconds=0.01) for skin in (0.25, 1.5)
    )
    np.testing.assert_allclose(narrow.energy, wide.energy, rtol=0, atol=ROUNDING)


def test_replicas_do_not_see_each_other(pair, structures):
    together = run(pair, structures[:1] * 3)
    alone = run(pair, structures[:1])
    np.testing.assert_allclose(together.energy[:, 0], alone.energy[:, 0], rtol=0, atol=ROUNDING)
    assert np.abs(together.energy[-1, 1] - together.energy[-1, 0]) > 1e-3, "other velocities"


def test_the_same_seed_is_the_same_trajectory(pair, structures):
    one, same, other = (run(pair, structures[:1], seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.energy, same.energy)
    assert not np.array_equal(one.energy, other.energy)


def test_single_precision_is_the_networks_alone(pair, structures):
    exact, single = (run(pair, structures, dtype=dtype) for dtype in ("float64", "float32"))
    difference = np.abs(exact.energy - single.energy).max()
    assert 0 < difference < 1e-4


@dataclasses.dataclass(frozen=True)
class Limited:
    """A config seen through, with a limit on neighbours."""

    config: object
    limit: NeighborLimit

    def __getattr__(self, name):
        return getattr(self.config, name)

    def frame(self, structure, head=None, skin=0.0):
        from equizoo.graph import make_frame

        assert skin == 0
        return make_frame(
            structure, self.config.cutoff, self.config.atomic_numbers, limit=self.limit
        )


def test_a_limit_on_neighbours_is_kept_at_every_step(pair, structures):
    limited = pair.recompiled()
    limited.config = Limited(pair.config, NeighborLimit(1000))
    found, expected = (run(p, structures, picoseconds=0.01) for p in (limited, pair))
    assert found.num_lists == 11 and isinstance(limited, Potential)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=0, atol=ROUNDING)
    limited.config = Limited(pair.config, NeighborLimit(2))
    fewer = run(limited, structures, picoseconds=0.01)
    assert np.abs(fewer.energy - expected.energy).max() > 1e-3


def test_the_thermostat_holds_its_temperature(pair):
    """Atoms out of reach of each other: every velocity is an Ornstein-Uhlenbeck process."""
    far = np.arange(60)[:, None] * np.array([[100.0, 0, 0]])
    gas = Structure(np.full(60, 6), far, np.zeros((3, 3)))
    found = simulate(
        pair, [gas, gas], Langevin(500.0, friction=100.0), timestep=2.0, picoseconds=1.0
    )
    settled = found.temperature[found.time > 0.1]
    # 180 degrees of freedom, twice, decorrelated after 1/(2 friction) = 5 fs: about 90 times
    error = 500 * np.sqrt(2 / (2 * 180 * 90))
    assert abs(settled.mean() - 500) < 4 * error
    # and fluctuates as the canonical ensemble does
    assert settled.std() == pytest.approx(500 * np.sqrt(2 / 180), rel=0.2)


def test_bonds_and_contacts_are_watched(pair, structures):
    found = run(pair, structures)
    assert found.stretch[0, 0] == pytest.approx(1.0) and found.stretch[-1, 0] > 1.05
    np.testing.assert_array_equal(found.stretch[:, 1], 0)  # periodic: no bonds are held to
    assert (found.closest > 0).all() and found.closest[0, 0] < 1.6 / 0.62


def test_what_flies_apart_is_not_finished(pair, structures):
    squeezed = dataclasses.replace(structures[0], positions=1e-3 * structures[0].positions)
    hot = simulate(pair, [squeezed], NVE(1e9), timestep=1.0, picoseconds=0.1)
    assert not hot.finished and len(hot.time) < 100


def test_drift_is_the_slope_per_atom():
    time = np.linspace(0, 2, 201)
    wave = 0.003 * np.sin(2 * np.pi * 7 * time)
    energy = np.stack([5 + 0.004 * time + wave, -3 - 0.01 * time], axis=1)  # [eV]
    zeros = np.zeros_like(energy)
    spin = np.zeros((*energy.shape, 3))
    found = drift(Trajectory(time, energy, zeros, zeros, zeros, spin, True, 1), [2, 10])
    assert found["drift_meV_per_atom_per_ps"] == pytest.approx(2.0, rel=0.05)
    assert found["mean_drift_meV_per_atom_per_ps"] == pytest.approx(0.5, rel=0.1)
    assert found["fluctuation_meV_per_atom"] == pytest.approx(1.5 / np.sqrt(2), rel=0.01)


@pytest.mark.parametrize("option", [{"timestep": 0.0}, {"picoseconds": 0.0}, {"skin": 0.0}])
def test_sizes_must_be_positive(pair, structures, option):
    with pytest.raises(ValueError, match="expected all of them positive"):
        run(pair, structures, **option)
    with pytest.raises(ValueError, match="0 structures"):
        run(pair, [])


def test_the_energy_reference_plays_no_part(pair, structures):
    shifted = Potential(
        pair.model,
        reference_energies={1: 0.0, 6: 1.0, 8: 2.0},
        energy_reference=EnergyReference.TOTAL,
        level_of_theory="none",
        name="shifted",
    )
    one, other = (run(p, structures[:1]) for p in (pair, shifted))
    np.testing.assert_array_equal(one.energy, other.energy)
