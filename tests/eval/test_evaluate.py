import dataclasses
import json

import numpy as np
import pytest
from models import cluster, crystal, pair_potential

from equizoo.data.readers import Dataset, LeftOut, ReadReport
from equizoo.eval.evaluate import PointSample, evaluate
from equizoo.structure import EnergyReference, Structure


def dataset(structures, **fields):
    left_out = {"no energy": LeftOut(2, ("a.xyz[0]", "a.xyz[4]"))}
    report = ReadReport(len(structures) + 2, len(structures), 0, {}, left_out, {})
    values = {
        "structures": tuple(structures),
        "energy_reference": EnergyReference.TOTAL,
        "level_of_theory": "none",
        "isolated_atoms": {},
        "report": report,
        "name": "toy",
    }
    return Dataset(**values | fields)


@pytest.fixture(scope="module")
def potential():
    return pair_potential()


@pytest.fixture
def labelled(potential):
    """Labels are the potential's own, with known errors added."""
    rng = np.random.default_rng(0)
    atoms = [crystal(rng), cluster(rng, 6), cluster(rng, 9)]
    structures = []
    for a, r in zip(atoms, potential.predict(atoms), strict=True):
        stress = None if r.stress is None else r.stress + 0.001
        labels = {"energy": r.energy + 0.01, "forces": r.forces - 0.002, "stress": stress}
        structures.append(dataclasses.replace(Structure.from_atoms(a), **labels))
    return structures


def test_known_errors_are_found(potential, labelled):
    labelled[2] = dataclasses.replace(labelled[2], energy=None)
    evaluation = evaluate(potential, dataset(labelled), progress=True)
    metrics = evaluation.metrics
    assert metrics["energy_mae_meV"] == pytest.approx(10.0, abs=0.01)
    assert metrics["forces_rmse_meV_per_A"] == pytest.approx(2.0, abs=0.01)
    assert metrics["stress_rmse_meV_per_A3"] == pytest.approx(1.0, abs=0.01)
    assert (metrics["num_structures"], metrics["num_energies"]) == (3, 2)
    assert metrics["num_force_components"] == 3 * (8 + 6 + 9) == len(evaluation.forces)
    assert (evaluation.dtype, evaluation.model, evaluation.dataset) == ("float32", "pair", "toy")
    assert evaluation.left_out == {"no energy": 2}
    assert evaluation.energy_per_atom.shape == (2, 2)
    difference = evaluation.energy_per_atom @ [1, -1]
    np.testing.assert_allclose(difference, [0.01 / 8, 0.01 / 6], atol=1e-7)
    assert json.loads(json.dumps(evaluation.to_dict()))["metrics"] == metrics


def test_a_sample_of_points_is_kept_and_errors_are_over_all(potential, labelled, monkeypatch):
    seen = []
    whole = evaluate(potential, dataset(labelled), observe=lambda *pair: seen.append(pair))
    assert [structure for structure, _ in seen] == labelled
    monkeypatch.setattr("equizoo.eval.evaluate.PARITY_POINTS", 10)
    sampled = evaluate(potential, dataset(labelled))
    assert sampled.metrics == whole.metrics
    assert len(whole.forces) == 69 and len(sampled.forces) == 10
    rows = {tuple(row): place for place, row in enumerate(whole.forces.round(4).tolist())}
    places = [rows[tuple(row)] for row in sampled.forces.round(4).tolist()]
    assert places == sorted(set(places)) and places != list(range(10))
    np.testing.assert_allclose(sampled.energy_per_atom, whole.energy_per_atom, rtol=1e-6)


def test_a_sample_is_uniform_and_bounded_while_it_grows():
    taken = np.zeros(50)
    for seed in range(400):
        sample = PointSample(10, seed)
        for start in range(0, 50, 5):
            sample.add(np.repeat(np.arange(start, start + 5.0)[:, None], 2, axis=1))
            assert sum(map(len, sample._points)) <= 20
        taken[sample.points[:, 0].astype(int)] += 1
    assert taken.sum() == 4000
    np.testing.assert_allclose(taken, 80, atol=5 * np.sqrt(80 * 0.8))
    few = PointSample(10)
    few.add(np.ones((7, 2)))
    assert len(few.points) == 7 and PointSample(10).points.shape == (0, 2)


def test_another_energy_reference_is_refused(potential, labelled):
    other = dataset(labelled, energy_reference=EnergyReference.ADSORPTION)
    with pytest.raises(ValueError, match="two energy references, 'total' and 'adsorption'"):
        evaluate(potential, other)


def test_data_without_labels_are_refused(potential):
    bare = [Structure.from_atoms(cluster(np.random.default_rng(1), 3))]
    with pytest.raises(ValueError, match="toy: none of its 1 structures has energy, forces or st"):
        evaluate(potential, dataset(bare))


def test_forces_alone_suffice(potential, labelled):
    forces_only = [dataclasses.replace(s, energy=None, stress=None) for s in labelled]
    evaluation = evaluate(potential, dataset(forces_only), dtype="float64")
    assert evaluation.dtype == "float64"
    assert evaluation.energy_per_atom.shape == evaluation.stress.shape == (0, 2)
    assert "energy_mae_meV" not in evaluation.metrics
