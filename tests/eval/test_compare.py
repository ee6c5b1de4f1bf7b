"""Two models on the same structures: known differences come out, with what they are worth."""

import dataclasses
import json

import numpy as np
import pytest
from models import cluster, mace_potential
from test_evaluate import dataset

from equizoo.eval.compare import compare
from equizoo.eval.evaluate import evaluate
from equizoo.structure import Structure


@pytest.fixture(scope="module")
def two():
    return {"a": mace_potential(seed=0, name="a"), "b": mace_potential(seed=1, name="b")}


@pytest.fixture(scope="module")
def data(two):
    """Labels are those of the first model, but for its force on every third structure."""
    rng = np.random.default_rng(0)
    atoms = [cluster(rng, nodes) for nodes in (4, 5, 4, 5, 4, 5)]
    structures = []
    for index, (a, r) in enumerate(zip(atoms, two["a"].predict(atoms), strict=True)):
        shift = 0.5 if index % 3 == 0 else 0.0
        labels = {"energy": r.energy + 0.001, "forces": r.forces + shift}
        structures.append(dataclasses.replace(Structure.from_atoms(a), **labels))
    return dataset(structures)


def test_differences_are_taken_by_structure(two, data):
    found = compare(two, data)
    assert found.models == ("a", "b") and found.notes == ()
    for name, potential in two.items():
        metrics = dict(evaluate(potential, data).metrics)
        assert found.metrics[name].keys() == metrics.keys()
        for key, value in metrics.items():
            assert found.metrics[name][key] == pytest.approx(value), key
    of_each = {
        name: [
            np.abs(r.forces - s.forces).mean()
            for s, r in zip(data.structures, potential.predict(data.structures), strict=True)
        ]
        for name, potential in two.items()
    }
    difference = 1e3 * (np.array(of_each["b"]) - np.array(of_each["a"]))
    forces = found.differences["b"]["forces_meV_per_A"]
    assert forces["difference"] == pytest.approx(difference.mean(), rel=1e-4)
    expected = difference.std(ddof=1) / np.sqrt(6)
    assert forces["standard_error"] == pytest.approx(expected, rel=1e-4)
    assert forces["better"] == pytest.approx(np.mean(difference < 0))
    assert found.differences["b"]["energy_meV_per_atom"]["better"] == 0


def test_atoms_held_fixed_are_left_out_of_differences_too(two, data):
    held = [
        dataclasses.replace(s, info={"fixed": np.arange(s.num_nodes) < held})
        for s, held in zip(data.structures, (1, 2, 0, 1, 4, 3), strict=True)  # the fifth whole
    ]
    found = compare(two, dataset(held)).differences["b"]["forces_meV_per_A"]
    of_each = {
        name: [
            np.abs((r.forces - s.forces)[s.free]).mean()
            for s, r in zip(held, potential.predict(held), strict=True)
            if s.free.any()
        ]
        for name, potential in two.items()
    }
    difference = 1e3 * (np.array(of_each["b"]) - np.array(of_each["a"]))
    assert len(difference) == 5
    assert found["difference"] == pytest.approx(difference.mean(), rel=1e-4)


def test_it_is_a_table_and_json(two, data):
    other = dataclasses.replace(data, level_of_theory="PBE")
    found = compare(two, other, speed=True)
    assert json.loads(json.dumps(found.to_dict()))["models"] == ["a", "b"]
    rows = dict(found.rows())
    assert rows["architecture"] == ["mace", "mace"]
    assert rows["tensor product"] == ["clebsch_gordan", "clebsch_gordan"]
    assert float(rows["ms per atom"][0]) > 0
    assert rows["energy MAE [meV/atom]"][0] == "0.225"
    assert "better on 0 %" in rows["energy MAE against a"][1]
    assert len(found.notes) == 2 and "a was trained at 'none', the data are 'PBE'" in found.notes[0]


def test_one_model_is_no_comparison(two, data):
    with pytest.raises(ValueError, match="A comparison of a: expected two or more different"):
        compare({"a": two["a"]}, data)
