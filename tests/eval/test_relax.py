"""Batched relaxation takes the steps of ASE's optimisers, whatever shares the batch."""

import dataclasses

import ase.optimize
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from models import ENERGIES, Pair, cluster, pair_potential

from equizoo.eval.optimizers import FIRE, LBFGS
from equizoo.eval.potential import Potential
from equizoo.eval.relax import Relaxer
from equizoo.graph import batch_frames, edge_vectors, within_cutoff
from equizoo.neighbors import NeighborLimit
from equizoo.structure import EnergyReference, Structure

SAME_STEPS = 1e-8  # [Å] of float64 sums in another order, over some tens of steps


@pytest.fixture(scope="module")
def potential():
    return pair_potential(cutoff=2.5)


def squeezed(seed: int, nodes: int, fixed: int = 1) -> Atoms:
    """A cluster in a periodic box just too small for it, so that there is something to relax."""
    atoms = cluster(np.random.default_rng(seed), nodes, spacing=1.5)
    atoms.set_cell(np.eye(3) * 4.2 + 0.1)
    atoms.pbc = True
    atoms.set_constraint(FixAtoms(list(range(fixed))))
    return atoms


def by_ase(potential, atoms: Atoms, optimizer, fmax: float, steps: int, **options):
    atoms = atoms.copy()
    atoms.calc = potential.calculator("float64")
    run = optimizer(atoms, logfile=None, **options)
    converged = run.run(fmax=fmax, steps=steps)
    return atoms, run.nsteps, converged


BOTH = pytest.mark.parametrize(
    ("ours", "theirs"), [(LBFGS(), ase.optimize.LBFGS), (FIRE(), ase.optimize.FIRE)]
)


@BOTH
@pytest.mark.parametrize("skin", [0.0, 0.3])
def test_the_steps_are_those_of_ase(potential, ours, theirs, skin):
    structures = [squeezed(seed, nodes) for seed, nodes in enumerate((5, 3, 8))]
    relaxer = Relaxer(
        potential, optimizer=ours, fmax=1e-9, max_steps=25, dtype="float64", skin=skin
    )
    for atoms, relaxed in zip(structures, relaxer(structures), strict=True):
        expected, steps, _ = by_ase(potential, atoms, theirs, 1e-9, 25)
        assert relaxed.steps == steps == 25 and not relaxed.converged
        assert np.abs(relaxed.positions - atoms.positions).max() > 0.05
        np.testing.assert_allclose(relaxed.positions, expected.positions, atol=SAME_STEPS)
        assert relaxed.energy == pytest.approx(expected.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(
            relaxed.forces, expected.get_forces(apply_constraint=False), atol=1e-7
        )


@BOTH
def test_steps_that_are_cut_and_a_short_memory(potential, ours, theirs):
    atoms = squeezed(3, 6)
    if isinstance(ours, LBFGS):
        ours, options = LBFGS(memory=4, alpha=3.0, max_step=0.02), dict(memory=4, alpha=3.0)
        options["maxstep"] = 0.02
    else:
        ours, options = FIRE(time_step=0.5, max_step=0.03), dict(dt=0.5, maxstep=0.03)
    (relaxed,) = Relaxer(potential, optimizer=ours, fmax=1e-9, max_steps=15, dtype="float64")(
        [atoms]
    )
    expected, _, _ = by_ase(potential, atoms, theirs, 1e-9, 15, **options)
    np.testing.assert_allclose(relaxed.positions, expected.positions, atol=SAME_STEPS)


def test_every_structure_ends_by_itself_and_makes_room(potential):
    structures = [squeezed(seed, 3 + seed % 5) for seed in range(9)]
    relaxer = Relaxer(potential, fmax=0.002, max_steps=60, dtype="float64", batch_nodes=16)
    done = []
    results = relaxer(structures, advance=done.append)
    assert sum(done) == 9 and len({r.steps for r in results}) > 2
    for atoms, relaxed in zip(structures, results, strict=True):
        expected, steps, converged = by_ase(potential, atoms, ase.optimize.LBFGS, 0.002, 60)
        assert (relaxed.steps, relaxed.converged) == (steps, converged)
        np.testing.assert_allclose(relaxed.positions, expected.positions, atol=1e-6)
        forces = np.linalg.norm(relaxed.forces[1:], axis=1)
        assert relaxed.converged == (forces.max() < 0.002)
        np.testing.assert_array_equal(relaxed.positions[0], atoms.positions[0])


def test_float32_ends_where_float64_does(potential):
    structures = [squeezed(seed, 6) for seed in range(3)]
    runs = [
        Relaxer(potential, fmax=0.01, dtype=dtype)(structures) for dtype in ("float32", "float64")
    ]
    for a, b in zip(*runs, strict=True):
        assert a.converged and b.converged
        assert a.energy == pytest.approx(b.energy, abs=1e-4)


def test_trajectories(potential):
    atoms = squeezed(1, 5)
    (relaxed,) = Relaxer(potential, max_steps=4, fmax=1e-9, dtype="float64")([atoms], record=True)
    assert len(relaxed.trajectory) == relaxed.steps + 1 == 5
    first, last = relaxed.trajectory[0], relaxed.trajectory[-1]
    np.testing.assert_array_equal(first.positions, atoms.positions)
    np.testing.assert_array_equal(last.positions, relaxed.positions)
    assert last.energy == relaxed.energy
    for structure in relaxed.trajectory:
        again = potential.predict(dataclasses.replace(structure, energy=None), dtype="float64")
        assert structure.energy == pytest.approx(again.energy, abs=1e-9)
        np.testing.assert_allclose(structure.forces, again.forces, atol=1e-9)
    assert relaxed.energy < first.energy


def test_labels_of_the_start_are_not_those_of_the_trajectory(potential):
    start = dataclasses.replace(Structure.from_atoms(squeezed(1, 5)), stress=np.eye(3))
    relaxer = Relaxer(potential, max_steps=2, fmax=1e-9)
    (relaxed,) = relaxer([start], record=True)
    assert [s.stress for s in relaxed.trajectory] == [None] * 3


def test_constraints_that_would_be_ignored_are_refused(potential):
    atoms = squeezed(1, 5)
    atoms.set_constraint(FixCartesian([0], (True, False, False)))
    with pytest.raises(ValueError, match=r"structures\[0\] has the constraint FixCartesian"):
        Relaxer(potential)([atoms])


def test_nothing_to_do(potential):
    lone = Atoms("H", [[0, 0, 0]])
    held = squeezed(0, 3, fixed=3)
    relaxer = Relaxer(potential, max_steps=0, dtype="float64")
    alone, still, cut = relaxer([lone, held, squeezed(0, 5)])
    assert (alone.steps, alone.converged) == (0, True)
    assert (still.steps, still.converged) == (0, True)
    assert (cut.steps, cut.converged) == (0, False)
    np.testing.assert_array_equal(still.positions, held.positions)
    assert relaxer([]) == []


class Broken(Pair):
    """No finite energy for carbon."""

    def node_energies(self, vectors, graph):
        energies = super().node_energies(vectors, graph)
        return energies * jnp.where(graph.species == 1, jnp.nan, 1.0).astype(energies.dtype)


def test_numbers_that_are_not_finite_end_one_structure_alone(potential):
    broken = Potential(
        Broken(potential.config),
        reference_energies=ENERGIES,
        energy_reference=EnergyReference.TOTAL,
        level_of_theory="none",
        name="broken",
    )
    good, bad = squeezed(2, 5), squeezed(3, 5)
    good.numbers[:], bad.numbers[:] = 8, 6
    relaxer = Relaxer(broken, fmax=0.01, dtype="float64")
    ended, relaxed = relaxer([bad, good])
    assert not ended.converged and ended.steps == 0 and not np.isfinite(ended.energy)
    np.testing.assert_array_equal(ended.positions, bad.positions)
    (alone,) = Relaxer(potential, fmax=0.01, dtype="float64")([good])
    assert relaxed.converged and relaxed.steps == alone.steps > 0
    np.testing.assert_allclose(relaxed.positions, alone.positions, atol=1e-9)


class Killed(Exception):
    pass


@pytest.mark.parametrize("record", [False, True], ids=["ends", "trajectories"])
@pytest.mark.parametrize("skin", [0.0, 0.3])
@pytest.mark.parametrize("killed_after", [1, 4, 6])
def test_a_killed_run_ends_where_it_would_have(potential, tmp_path, killed_after, skin, record):
    """To the last bit: structures keep the batches, and the places in them, that they had."""
    structures = [squeezed(seed, nodes) for seed, nodes in enumerate((4, 6, 3, 5, 4, 6, 5))]
    options = dict(fmax=0.01, max_steps=40, batch_nodes=24, skin=skin, lanes=2)
    whole = Relaxer(potential, **options)(structures, record=record)
    left = killed_after

    def kill(ended):
        nonlocal left
        left -= ended
        if left == 0:
            raise Killed

    with pytest.raises(Killed):
        Relaxer(potential, **options)(
            structures, folder=tmp_path, record=record, save_every=0.0, advance=kill
        )
    assert (tmp_path / "under-way.npz").exists()
    computed = []
    resumed = Relaxer(potential, **options)(
        structures, folder=tmp_path, record=record, advance=computed.append
    )
    assert 0 < computed[0] < killed_after + 1 or killed_after == 1
    assert sum(computed) == len(structures) and not (tmp_path / "under-way.npz").exists()
    for a, b in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
        np.testing.assert_array_equal(a.forces, b.forces)
        assert (a.energy, a.steps, a.converged) == (b.energy, b.steps, b.converged)
        assert len(a.trajectory) == len(b.trajectory) == (a.steps + 1 if record else 0)
        for one, other in zip(a.trajectory, b.trajectory, strict=True):
            np.testing.assert_array_equal(one.positions, other.positions)
            assert one.energy == other.energy


def test_a_run_goes_on_from_its_folder(potential, tmp_path):
    structures = [squeezed(seed, 4) for seed in range(5)]
    relaxer = Relaxer(potential, fmax=0.01, batch_nodes=12)
    results = relaxer(structures, folder=tmp_path / "run", record=True)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("0*.npz")}
    assert len(before) == 5
    whole = relaxer(structures, folder=tmp_path / "run", record=True)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("0*.npz")}
    assert before == after
    for a, b in zip(results, whole, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
        assert (a.energy, a.steps, len(a.trajectory)) == (b.energy, b.steps, len(b.trajectory))
    with pytest.raises(ValueError, match="parts of another run.*structures_sha256"):
        relaxer(structures[:2], folder=tmp_path / "run", record=True)
    charged = [atoms.copy() for atoms in structures]
    charged[0].info["charge"] = 1.0
    with pytest.raises(ValueError, match="parts of another run.*structures_sha256"):
        relaxer(charged, folder=tmp_path / "run", record=True)
    with pytest.raises(ValueError, match="another run.*fmax: 0.01 there, 0.02 now"):
        Relaxer(potential, batch_nodes=12)(structures, folder=tmp_path / "run", record=True)


def test_few_programs_are_compiled(potential):
    relaxer = Relaxer(potential, fmax=0.003, max_steps=30, batch_nodes=32)
    relaxer([squeezed(seed, 3 + seed % 6) for seed in range(16)])
    assert relaxer._program._cache_size() <= 4


@pytest.mark.parametrize("nodes", [2, 9])
def test_edges_beyond_the_cutoff_become_padding(potential, nodes):
    structure = Structure.from_atoms(squeezed(0, nodes))
    plain, skinned = potential.frame(structure), potential.frame(structure, skin=2.0)
    assert skinned.num_edges > plain.num_edges
    budget = potential.plan_budgets([structure]).budgets[0]
    for frame in (plain, skinned):
        chosen = dataclasses.replace(
            budget, nodes=16, edges=16 * 200, slots=200, out_slots=200, blocks=32
        )
        graph = within_cutoff(batch_frames([frame], chosen, np.float64), 2.5)
        assert int(graph.edge_mask.sum()) == plain.num_edges
        assert int((graph.outgoing < graph.num_edges).sum()) == plain.num_edges
        lengths = jnp.linalg.norm(edge_vectors(graph, 2.5), axis=1)
        assert float(lengths.max()) <= 2.5


def test_a_skin_needs_all_neighbors(potential):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Nearest(type(potential.config)):
        @property
        def limit(self):
            return NeighborLimit(2)

    config = Nearest(atomic_numbers=(1, 6, 8), cutoff=2.5, avg_num_neighbors=8.0)
    with pytest.raises(ValueError, match="must be found anew for every step"):
        config.frame(Structure.from_atoms(squeezed(0, 4)), skin=0.1)
    for options in (dict(fmax=0.0), dict(max_steps=-1), dict(batch_nodes=1)):
        with pytest.raises(ValueError, match="expected a positive force"):
            Relaxer(potential, **options)
    with pytest.raises(ValueError, match="skin is -1"):
        Relaxer(potential, skin=-1.0)
    with pytest.raises(ValueError, match="dtype is 'half'"):
        Relaxer(potential, dtype="half")
    with pytest.raises(ValueError, match="memory, alpha and max_step must be positive"):
        LBFGS(memory=0)
