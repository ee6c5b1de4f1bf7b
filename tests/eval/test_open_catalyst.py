"""Metrics of OC20 and OC22 on cases worked out by hand, and against plain restatements."""

import dataclasses

import numpy as np
import pytest

from equizoo.data.catalyst_frames import CatalystFrame
from equizoo.eval.open_catalyst import (
    DISTANCE_THRESHOLDS,
    IS2REMetrics,
    IS2RSMetrics,
    S2EFMetrics,
    average_of_splits,
    minimum_image,
)
from equizoo.structure import EnergyReference, Structure

TOTAL, ADSORPTION = EnergyReference.TOTAL, EnergyReference.ADSORPTION


def frame(
    forces, energy: float = 0.0, fixed=None, relaxed=None, relaxed_energy=None, cell=10.0
) -> CatalystFrame:
    forces = np.array(forces, np.float64)
    nodes = len(forces)
    structure = Structure(
        atomic_numbers=np.full(nodes, 29),
        positions=np.zeros((nodes, 3)),
        cell=np.eye(3) * cell,
        pbc=(True, True, True),
        energy=energy,
        forces=forces,
        name="a[0]",
    )
    return CatalystFrame(
        structure=structure,
        sid=1,
        fid=0,
        fixed=np.zeros(nodes, bool) if fixed is None else np.array(fixed, bool),
        energy_reference=ADSORPTION,
        relaxed_energy=relaxed_energy,
        relaxed_positions=None if relaxed is None else np.array(relaxed, np.float64),
    )


def s2ef(*cases) -> dict:
    metrics = S2EFMetrics(ADSORPTION)
    for labelled, energy, forces in cases:
        metrics.add(labelled, energy, np.array(forces, np.float64).reshape(-1, 3))
    return metrics.summary()


def test_only_free_atoms_count():
    labelled = frame([[1, 2, 3], [4, 5, 6]], energy=-1.0, fixed=[True, False])
    result = s2ef((labelled, -1.5, [[100, 100, 100], [5, 5, 4]]))
    assert result["energy_mae_meV"] == pytest.approx(500)
    assert result["forces_mae_meV_per_A"] == pytest.approx(1000)  # (1 + 0 + 2) / 3
    assert result["forces_x_mae_meV_per_A"] == pytest.approx(1000)
    assert result["forces_y_mae_meV_per_A"] == 0
    assert result["forces_z_mae_meV_per_A"] == pytest.approx(2000)
    assert result["forces_cosine"] == pytest.approx((20 + 25 + 24) / np.sqrt(77 * 66))
    lengths = abs(np.sqrt(66) - np.sqrt(77))
    assert result["forces_magnitude_mae_meV_per_A"] == pytest.approx(1000 * lengths)
    assert (result["num_systems"], result["num_free_atoms"]) == (1, 1)


def test_averages_are_over_atoms_and_not_over_systems():
    one, three = frame([[0, 0, 0]]), frame([[0, 0, 0]] * 3)
    result = s2ef((one, 0.0, [[4, 0, 0]]), (three, 2.0, [[0, 0, 0]] * 3))
    assert result["forces_mae_meV_per_A"] == pytest.approx(4000 / 12)  # not (4/3 + 0) / 2
    assert result["energy_mae_meV"] == pytest.approx(1000)


def test_an_atom_without_force_pulls_the_cosine_down():
    labelled = frame([[0, 0, 0], [0, 0, 2], [0, 3, 0]])
    result = s2ef((labelled, 0.0, [[1, 0, 0], [0, 0, 5], [0, -1, 0]]))
    assert result["forces_cosine"] == pytest.approx((0 + 1 - 1) / 3)
    tiny = s2ef((frame([[1e-5, 0, 0]]), 0.0, [[1e-5, 0, 0]]))
    assert tiny["forces_cosine"] == pytest.approx(1e-10 / 1e-8)


@pytest.mark.parametrize(
    ("energy", "force", "within"),
    [
        (0.0199, 0.0299, True),
        (0.02, 0.0, False),  # strictly smaller
        (-0.02, 0.0, False),
        (0.0, 0.03, False),
        (0.0, -0.03, False),
        (0.0199, 0.031, False),
        (0.0201, 0.0, False),
    ],
)
def test_thresholds_are_strict(energy, force, within):
    result = s2ef((frame([[0, 0, 0], [0, 0, 0]]), energy, [[0, 0, 0], [0, 0, force]]))
    assert result["EFwT_percent"] == (100 if within else 0)


def test_components_are_judged_and_not_lengths():
    result = s2ef((frame([[0, 0, 0]]), 0.0, [[0.029, 0.029, 0.029]]))  # length 0.050
    assert result["EFwT_percent"] == 100


def test_a_system_without_free_atoms_is_judged_by_its_energy():
    labelled = frame([[1, 1, 1]], fixed=[True])
    good = s2ef((labelled, 0.01, [[9, 9, 9]]))
    assert good["EFwT_percent"] == 100 and "forces_mae_meV_per_A" not in good
    assert s2ef((labelled, 0.03, [[9, 9, 9]]))["EFwT_percent"] == 0
    with_another = s2ef((labelled, 0.0, [[9, 9, 9]]), (frame([[0, 0, 0]]), 0.0, [[0.3, 0, 0]]))
    assert with_another["forces_mae_meV_per_A"] == pytest.approx(100)
    assert with_another["EFwT_percent"] == 50


def test_s2ef_against_a_plain_restatement():
    rng = np.random.default_rng(0)
    metrics, rows, cosines, within = S2EFMetrics(ADSORPTION), [], [], []
    for _ in range(20):
        nodes = int(rng.integers(1, 9))
        forces = rng.normal(size=(nodes, 3)) * 0.02
        fixed = rng.random(nodes) < 0.4
        labelled = frame(forces, energy=float(rng.normal()), fixed=fixed)
        predicted = forces + rng.normal(size=(nodes, 3)) * 0.01
        energy = labelled.structure.energy + float(rng.normal()) * 0.02
        metrics.add(labelled, energy, predicted)
        errors = [
            abs(p - f) for p, f, held in zip(predicted, forces, fixed, strict=True) if not held
        ]
        rows += errors
        for p, f, held in zip(predicted, forces, fixed, strict=True):
            if not held:
                cosines.append(p @ f / max(np.sqrt(p @ p) * np.sqrt(f @ f), 1e-8))
        within.append(
            abs(energy - labelled.structure.energy) < 0.02
            and all(component < 0.03 for error in errors for component in error)
        )
    result = metrics.summary()
    assert result["forces_mae_meV_per_A"] == pytest.approx(1000 * np.mean(rows))
    assert result["forces_cosine"] == pytest.approx(np.mean(cosines))
    assert result["EFwT_percent"] == pytest.approx(100 * np.mean(within))
    assert 0 < result["EFwT_percent"] < 100


def test_is2re():
    metrics = IS2REMetrics(ADSORPTION)
    for predicted in (0.5, 0.0199, -0.02):
        metrics.add(frame([[0, 0, 0]], relaxed_energy=0.0), predicted)
    result = metrics.summary()
    assert result["energy_mae_meV"] == pytest.approx((500 + 19.9 + 20) / 3)
    assert result["energy_mse_eV2"] == pytest.approx((0.25 + 0.0199**2 + 0.02**2) / 3)
    assert result["EwT_percent"] == pytest.approx(100 / 3)


def adwt(*cases) -> float:
    metrics = IS2RSMetrics()
    for labelled, positions in cases:
        metrics.add(labelled, np.array(positions, np.float64))
    return metrics.summary()["ADwT_percent"]


def test_adwt_has_490_thresholds():
    assert len(DISTANCE_THRESHOLDS) == 490
    assert DISTANCE_THRESHOLDS[0] == 0.01 and DISTANCE_THRESHOLDS[-1] == pytest.approx(0.499)


def test_adwt_on_one_system():
    target = frame([[0, 0, 0]], relaxed=[[1, 1, 1]])
    assert adwt((target, [[1, 1, 1]])) == 100
    assert adwt((target, [[1, 1, 1.0095]])) == 100  # smaller than the first threshold
    # 0.0105 is not below 0.010, and below the 489 others
    assert adwt((target, [[1, 1, 1.0105]])) == pytest.approx(100 * 489 / 490)
    assert adwt((target, [[1, 1, 1.2505]])) == pytest.approx(100 * 249 / 490)
    assert adwt((target, [[1, 1, 1.6]])) == 0


def test_adwt_is_strict():
    # the distance 0.25 = 2^-2 is exact, and is no threshold itself: compare at one that is
    metrics = IS2RSMetrics()
    target = frame([[0, 0, 0]], relaxed=[[0, 0, 0]], cell=1.0)
    metrics.add(target, np.array([[0.0, 0.0, DISTANCE_THRESHOLDS[100]]]))
    assert metrics.summary()["ADwT_percent"] == pytest.approx(100 * 389 / 490)


def test_adwt_takes_the_mean_over_free_atoms_and_through_the_cell():
    target = frame([[0, 0, 0]] * 3, relaxed=[[0, 0, 0]] * 3, fixed=[True, False, False])
    # fixed atom anywhere; one free atom a cell and 0.1 away, the other 0.3: mean 0.2
    moved = [[5, 5, 5], [10.1, 0, 0], [0, 0, -0.3]]
    assert adwt((target, moved)) == pytest.approx(100 * np.mean(DISTANCE_THRESHOLDS > 0.2))
    none_free = frame([[0, 0, 0]], relaxed=[[0, 0, 0]], fixed=[True])
    assert adwt((none_free, [[3, 3, 3]])) == 100
    assert adwt((target, moved), (none_free, [[3, 3, 3]])) == pytest.approx(
        50 + 50 * np.mean(DISTANCE_THRESHOLDS > 0.2)
    )


def test_the_image_is_taken_by_axis_and_not_the_nearest():
    cell = np.array([[10.0, 0, 0], [9.0, 1.0, 0], [0, 0, 10.0]])
    half = minimum_image(np.array([[5.0, 0, 0], [-5.0, 0, 0], [-1e-17, 0, 0]]), np.eye(3) * 10.0)
    np.testing.assert_allclose(half, [[5, 0, 0], [5, 0, 0], [0, 0, 0]], atol=1e-15)
    vector = 0.4 * cell[0] - 0.4 * cell[1]  # already within (-1/2, 1/2]
    np.testing.assert_allclose(minimum_image(vector[None], cell), vector[None], atol=1e-14)
    vector = 0.4 * cell[0] + 0.4 * cell[1]  # 7.6 Å, though an image of 1.5 Å exists
    np.testing.assert_allclose(minimum_image(vector[None], cell), vector[None], atol=1e-14)
    assert np.linalg.norm(vector - cell[1]) < np.linalg.norm(vector)


def test_what_cannot_be_scored():
    labelled = frame([[0, 0, 0]])
    bare = dataclasses.replace(
        labelled, structure=dataclasses.replace(labelled.structure, energy=None)
    )
    with pytest.raises(ValueError, match="no energy and forces to compare with"):
        S2EFMetrics(ADSORPTION).add(bare, 0.0, np.zeros((1, 3)))
    with pytest.raises(ValueError, match="no relaxed energy"):
        IS2REMetrics(ADSORPTION).add(labelled, 0.0)
    with pytest.raises(ValueError, match="no relaxed positions"):
        IS2RSMetrics().add(labelled, np.zeros((1, 3)))
    with pytest.raises(ValueError, match="'total' and 'adsorption'"):
        S2EFMetrics(TOTAL).add(labelled, 0.0, np.zeros((1, 3)))
    for metrics in (S2EFMetrics(TOTAL), IS2REMetrics(TOTAL), IS2RSMetrics()):
        with pytest.raises(ValueError, match="no metric of no systems"):
            metrics.summary()


def test_the_average_of_splits_is_unweighted():
    splits = {
        "id": {"energy_mae_meV": 100.0, "num_systems": 10},
        "ood_ads": {"energy_mae_meV": 300.0, "num_systems": 1, "forces_cosine": 0.1},
    }
    assert average_of_splits(splits) == {"energy_mae_meV": 200.0}
    with pytest.raises(ValueError, match="no average of no splits"):
        average_of_splits({})
