import numpy as np
import pytest

from equizoo.eval.metrics import Metrics
from equizoo.eval.potential import Result
from equizoo.structure import EnergyReference, Structure

TOTAL = EnergyReference.TOTAL


NO_CELL = np.zeros((3, 3))


def structure(symbols, cell=NO_CELL, **labels):
    numbers = np.array([{"H": 1, "C": 6, "O": 8}[s] for s in symbols])
    positions = np.arange(3.0 * len(numbers)).reshape(-1, 3)
    return Structure(numbers, positions, cell, (bool(cell.any()),) * 3, **labels)


def result(nodes, energy=0.0, forces=None, stress=None):
    forces = np.zeros((nodes, 3)) if forces is None else forces
    return Result(energy, forces, stress, np.zeros(nodes))


def test_energies_by_hand():
    metrics = Metrics(TOTAL, TOTAL)
    metrics.add(structure("HC", energy=-10.0), result(2, -10.003))  # -3 meV, -1.5 per atom
    metrics.add(structure("HHHO", energy=5.0), result(4, 5.004))  # 4 meV, 1 per atom
    metrics.add(structure("O"), result(1, 77.0))  # no label
    summary = metrics.summary()
    expected = {
        "energy_mae_meV": 3.5,
        "energy_rmse_meV": np.sqrt((9 + 16) / 2),
        "energy_mae_meV_per_atom": 1.25,
        "energy_rmse_meV_per_atom": np.sqrt((2.25 + 1) / 2),
    }
    for key, value in expected.items():
        assert summary[key] == pytest.approx(value, rel=1e-9)
    counts = {key: value for key, value in summary.items() if key.startswith("num_")}
    assert counts == {
        "num_structures": 3,
        "num_atoms": 7,
        "num_fixed_atoms": 0,
        "num_energies": 2,
        "num_force_components": 0,
        "num_stress_components": 0,
        "num_stresses_without_prediction": 0,
    }
    assert not [key for key in summary if key.startswith(("forces", "stress"))]


def test_forces_by_hand():
    metrics = Metrics(TOTAL, TOTAL)
    zeros = np.zeros((2, 3))
    off = np.array([[0.003, 0.0, 0.0], [0.0, -0.004, 0.0]])
    metrics.add(structure("HC", forces=zeros), result(2, forces=off))
    metrics.add(structure("H", forces=zeros[:1]), result(1, forces=np.full((1, 3), 0.001)))
    metrics.add(structure("CC"), result(2, forces=np.full((2, 3), 9.0)))
    summary = metrics.summary()
    assert summary["num_force_components"] == 9
    assert summary["forces_mae_meV_per_A"] == pytest.approx(10 / 9)
    assert summary["forces_rmse_meV_per_A"] == pytest.approx(np.sqrt(28 / 9))
    assert summary["forces_mae_meV_per_A_by_element"] == pytest.approx({"H": 1.0, "C": 4 / 3})
    by_element = {"H": np.sqrt(12 / 6), "C": np.sqrt(16 / 3)}
    assert summary["forces_rmse_meV_per_A_by_element"] == pytest.approx(by_element)
    assert "energy_mae_meV" not in summary


def test_forces_on_atoms_held_fixed_do_not_count():
    metrics = Metrics(TOTAL, TOTAL)
    held = structure("HC", forces=np.zeros((2, 3)), info={"fixed": np.array([False, True])})
    metrics.add(held, result(2, forces=np.array([[0.002, 0, 0], [1.0, 1.0, 1.0]])))
    summary = metrics.summary()
    assert summary["forces_mae_meV_per_A"] == pytest.approx(2 / 3)
    assert summary["forces_mae_meV_per_A_by_element"] == pytest.approx({"H": 2 / 3})
    assert (summary["num_force_components"], summary["num_fixed_atoms"]) == (3, 1)


def test_stress_by_hand():
    metrics = Metrics(TOTAL, TOTAL)
    off = np.zeros((3, 3))
    off[0, 1] = off[1, 0] = 0.009
    metrics.add(structure("H", 3 * np.eye(3), stress=np.zeros((3, 3))), result(1, stress=off))
    metrics.add(structure("H", 3 * np.eye(3), stress=np.zeros((3, 3))), result(1))
    summary = metrics.summary()
    assert summary["stress_mae_meV_per_A3"] == pytest.approx(2.0)
    assert summary["stress_rmse_meV_per_A3"] == pytest.approx(9 * np.sqrt(2 / 9))
    assert summary["stress_mae_GPa"] == pytest.approx(0.002 * 160.2176634, rel=1e-6)
    assert summary["stress_rmse_GPa"] == pytest.approx(0.009 * np.sqrt(2 / 9) * 160.2176634, 1e-6)
    assert (summary["num_stress_components"], summary["num_stresses_without_prediction"]) == (9, 1)


def test_two_energy_references_are_not_compared():
    with pytest.raises(ValueError, match="two energy references, 'total' and 'adsorption'"):
        Metrics(TOTAL, EnergyReference.ADSORPTION)


def test_large_energies_keep_their_last_digits():
    metrics = Metrics(TOTAL, TOTAL)
    for _ in range(1000):
        metrics.add(structure("H", energy=-17660.0), result(1, -17660.0 + 1e-6))
    assert metrics.summary()["energy_mae_meV"] == pytest.approx(1e-3, rel=1e-5)
