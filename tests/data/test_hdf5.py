"""HDF5 in MACE's layouts: labels that count for nothing are absent."""

import numpy as np
import pytest
from test_records import assert_same_structure

from equizoo.data.prepare import prepare
from equizoo.data.readers import read_structures

h5py = pytest.importorskip("h5py", reason="the extra hdf5 is not installed")

CELL = np.diag([3.0, 4.0, 5.0])
VIRIALS = np.array([[6.0, 0.6, 0], [0.6, 12.0, 0], [0, 0, -6.0]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(group, *, old=False, periodic=True, weight=1.0, labels=None, weights=None):
    labels, weights = labels or {}, weights or {}
    group["atomic_numbers"] = np.array([8, 1, 1])
    group["positions"] = np.arange(9.0).reshape(3, 3) / 3
    group["cell"] = CELL if periodic else "None"
    group["pbc"] = np.array([periodic] * 3) if periodic else "None"
    group["weight"] = weight
    group["config_type"] = "Default"
    if old:
        for name, value in labels.items():
            group[name] = value
        for name, value in weights.items():
            group[f"{name}_weight"] = value
    else:
        for name, value in labels.items():
            group[f"properties/{name}"] = value
        for name, value in weights.items():
            group[f"property_weights/{name}"] = value


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("hdf5") / "train_0.h5"
    full = {"energy": -10.0, "forces": np.ones((3, 3)), "stress": np.eye(3), "virials": "None"}
    with h5py.File(path, "w") as file:
        file.attrs["drop_last"] = False
        batch = file.create_group("config_batch_0")
        for number in range(11):  # by number, not by name: config_10 is the last
            energy = {"energy": -10.0 - number}
            write(batch.create_group(f"config_{number}"), labels=full | energy)
        last = file.create_group("config_batch_1")
        zeros = {"energy": -1.0, "forces": np.zeros((3, 3)), "stress": np.zeros((3, 3))}
        write(
            last.create_group("config_0"),
            labels=zeros | {"virials": VIRIALS, "dipole": np.arange(3.0)},
            weights={"energy": 1.0, "forces": 0.0, "stress": 0.0, "virials": 1.0},
        )
        write(
            last.create_group("config_1"),
            periodic=False,
            labels={"energy": np.array([-2.0]), "total_charge": -1.0, "total_spin": 2.0},
        )
        write(last.create_group("config_2"), weight=0.0, labels=full)
        write(
            last.create_group("config_3"),
            old=True,
            labels={"energy": -3.0, "forces": np.ones((3, 3)), "stress": "None"},
            weights={"energy": 1.0, "forces": 0.0},
        )
    return path


def test_configurations_in_order_with_the_labels_that_count(path):
    structures = read_structures(path).structures
    assert len(structures) == 15
    assert [s.energy for s in structures[:11]] == [-10.0 - n for n in range(11)]
    np.testing.assert_array_equal(structures[10].forces, np.ones((3, 3)))
    np.testing.assert_array_equal(structures[10].stress, np.eye(3))
    assert structures[0].name == "train_0.h5[0]" and structures[0].pbc == (True, True, True)

    zero_weight, molecule, unweighted, old = structures[11:]
    assert zero_weight.energy == -1.0 and zero_weight.forces is None
    np.testing.assert_allclose(zero_weight.stress, -VIRIALS / 60.0)  # volume 60 Å^3
    np.testing.assert_array_equal(zero_weight.info["dipole"], np.arange(3.0))
    assert molecule.energy == -2.0 and molecule.forces is None and molecule.stress is None
    assert (molecule.charge, molecule.spin, molecule.pbc) == (-1.0, 2.0, (False,) * 3)
    assert unweighted.energy is None and unweighted.forces is None
    assert old.energy == -3.0 and old.forces is None and old.stress is None


def test_a_folder_of_them_is_prepared_like_any_data(path, tmp_path):
    (tmp_path / "train").mkdir()
    for number in (0, 2, 10):
        (tmp_path / f"train/train_{number}.h5").write_bytes(path.read_bytes())
    prepared = prepare([tmp_path / "train"], tmp_path / "out", frames_per_shard=6)
    assert len(prepared) == 45
    names = [s.name for s in prepared.structures]
    assert names[0] == "train_0.h5[0]" and names[-1] == "train_10.h5[14]"
    for a, b in zip(read_structures(path).structures, prepared.structures, strict=False):
        assert_same_structure(a, b)


def test_other_and_damaged_files_are_refused(path, tmp_path):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["weights"] = np.ones(3)
    with pytest.raises(ValueError, match="no group config_batch_0"):
        read_structures(other)
    other.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="damaged, truncated or not HDF5"):
        read_structures(other)
    with h5py.File(other, "w") as file:
        file["config_batch_0/config_0/positions"] = np.zeros((2, 3))
    with pytest.raises(ValueError, match="config_batch_0/config_0 is no configuration of MACE"):
        read_structures(other)
