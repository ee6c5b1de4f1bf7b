"""What energies of OC20's files are is stated, never guessed; conversions by published files."""

import json
from pathlib import Path

import numpy as np
import pytest
from pickled import records  # tests/data/pickled.py
from test_catalyst import ase_row, s2ef, save_lmdb

from equizoo import cli
from equizoo.config import from_dict
from equizoo.data.catalyst import open_catalyst
from equizoo.data.datasets import load_dataset
from equizoo.data.prepare import prepare
from equizoo.data.readers import write_structures
from equizoo.data.reference_energies import LinearReference, ReferenceEnergies, interaction_energy
from equizoo.structure import EnergyReference, Structure
from equizoo.train.recipe import DataConfig, load_recipe, prepare_data

RECIPES = Path(__file__).parents[2] / "recipes"
TOTAL, ADSORPTION = EnergyReference.TOTAL, EnergyReference.ADSORPTION
ENERGY, REFERENCE = -60.0, -58.5  # [eV] a small cell: its total could be an adsorption energy
NOT_SAID = "does not say what its energies are measured against.*--data-energy-reference"


def old_row(**changes) -> bytes:
    fields = {
        "pos": np.array([[0, 0, 0], [0, 0, 1.5]], "f4"),
        "cell": (8 * np.eye(3, dtype="f4"))[None],
        "atomic_numbers": np.array([29.0, 8.0], "f4"),
        "fixed": np.array([1.0, 0.0], "f4"),
        "sid": 7,
        "fid": 3,
        "y": ENERGY,
        "force": np.zeros((2, 3), "f4"),
    }
    return records("store").dump(fields | changes, 4)


@pytest.fixture(params=["lmdb", "aselmdb"])
def database(request, tmp_path):
    """Two frames of system 7 with total energies, and nothing in them that says so."""
    if request.param == "lmdb":
        rows = {str(i): old_row(fid=i) for i in range(2)}
    else:
        rows = {str(1 + i): ase_row(energy=ENERGY, data={"sid": 7, "fid": i}) for i in range(2)}
    return save_lmdb(tmp_path / f"data.{request.param}", rows)


@pytest.fixture
def references(tmp_path):
    path = tmp_path / "oc20_ref.pkl"
    path.write_bytes(records("flat").dump_plain({"random7": REFERENCE, "random8": 1.0}))
    return path


def test_a_database_that_does_not_say_is_refused(database, tmp_path):
    """By training, preparing and the command line; reading frames without labels goes on."""
    assert len(list(open_catalyst(database))) == 2
    with pytest.raises(ValueError, match=NOT_SAID):
        load_dataset(database)
    with pytest.raises(ValueError, match=NOT_SAID):  # a wish is no statement
        load_dataset(database, energy_reference=ADSORPTION)
    with pytest.raises(ValueError, match=NOT_SAID):
        prepare([database], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=NOT_SAID):
        prepare_data(DataConfig(train=str(database)))


@pytest.mark.parametrize("stated", [TOTAL, ADSORPTION])
def test_what_is_stated_is_what_they_are(database, tmp_path, stated):
    read = load_dataset(database, data_energy_reference=stated)
    prepared = prepare([database], tmp_path / "out", data_energy_reference=stated)
    for dataset in (read, prepared):
        assert dataset.energy_reference == stated
        assert [s.energy for s in dataset.structures] == [ENERGY, ENERGY]


def test_rows_and_files_that_say_need_no_statement(tmp_path):
    path = save_lmdb(tmp_path / "oc22" / "data.lmdb", {"0": old_row(oc22=1)})
    assert load_dataset(path).energy_reference == TOTAL
    with pytest.raises(ValueError, match="'total' and 'adsorption'"):
        load_dataset(path, data_energy_reference=ADSORPTION)
    (tmp_path / "raw").mkdir()
    raw = s2ef(tmp_path / "raw", "random3,frame1,-6.25\nrandom3,frame2,-6.25\n")
    assert load_dataset(raw).energy_reference == TOTAL
    with pytest.raises(ValueError, match="holds total energies"):
        load_dataset(raw, data_energy_reference=ADSORPTION)


def test_total_energies_become_adsorption_energies_by_the_published_file(
    database, references, tmp_path
):
    wanted = dict(data_energy_reference=TOTAL, energy_reference=ADSORPTION)
    with pytest.raises(ValueError, match="needs the energy of its clean surface"):
        load_dataset(database, **wanted)
    wanted |= dict(adsorption_references=references)
    folder = tmp_path / "out"
    config = DataConfig(
        train=str(database), num_valid=1, **(wanted | dict(adsorption_references=str(references)))
    )
    for dataset in (
        load_dataset(database, **wanted),
        prepare([database], folder, **wanted),
        prepare_data(config).train,
    ):
        assert dataset.energy_reference == ADSORPTION and len(dataset)
        assert all(s.energy == ENERGY - REFERENCE for s in dataset.structures)
    # and back, with the same file
    back = load_dataset(
        database,
        data_energy_reference=ADSORPTION,
        energy_reference=TOTAL,
        adsorption_references=references,
    )
    assert back.structures[0].energy == ENERGY + REFERENCE
    references.write_bytes(records("flat").dump_plain({"random7": REFERENCE + 1}))
    with pytest.raises(ValueError, match="other settings(.|\n)*references_sha256"):
        prepare([database], folder, **wanted)
    references.write_bytes(records("flat").dump_plain({"random8": 1.0}))
    with pytest.raises(ValueError, match="no reference energy for system 7 among 1"):
        load_dataset(database, **wanted)


def test_a_reference_beside_the_frame_comes_first(references, tmp_path):
    (tmp_path / "raw").mkdir()
    raw = s2ef(tmp_path / "raw", "random7,frame1,-6.25\nrandom7,frame2,0.0\n")
    wanted = dict(energy_reference=ADSORPTION, adsorption_references=references)
    energies = [s.energy for s in load_dataset(raw, **wanted).structures]
    assert energies == [-7.5 + 6.25, -7.5 - REFERENCE]  # 0.0 stands for one that is not known


def test_only_data_of_oc20_are_converted(references, tmp_path):
    path = tmp_path / "a.xyz"
    structure = Structure(
        atomic_numbers=np.array([8]), positions=np.zeros((1, 3)), cell=np.zeros((3, 3)),
        pbc=(False,) * 3, energy=-2.0, forces=np.zeros((1, 3)),
    )  # fmt: skip
    write_structures(path, [structure] * 2)
    assert load_dataset(path, data_energy_reference=ADSORPTION).energy_reference == ADSORPTION
    for options in (
        dict(adsorption_references=references),
        dict(data_energy_reference=TOTAL, energy_reference=ADSORPTION),
    ):
        with pytest.raises(ValueError, match="no data of OC20 or OC22, whose energies alone can"):
            load_dataset(path, **options)
        with pytest.raises(ValueError, match="no data of OC20 or OC22, whose energies alone can"):
            prepare([path], tmp_path / "out", **options)
    folder = tmp_path / "prepared"
    prepare([path], folder, data_energy_reference=ADSORPTION)
    assert len(load_dataset(folder, data_energy_reference=ADSORPTION)) == 2
    with pytest.raises(ValueError, match="'total' and 'adsorption'"):
        load_dataset(folder, data_energy_reference=TOTAL)
    with pytest.raises(ValueError, match="adsorption_references cannot be chosen any more"):
        load_dataset(folder, adsorption_references=references)


def test_the_command_line(database, references, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["prepare", str(database), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "does not say what its energies are" in " ".join(capsys.readouterr().err.split())
    cli.main([*arguments, "--data-energy-reference", "total", "--energy-reference", "adsorption",
              "--adsorption-references", str(references), "--json", "-"])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["frames"] == 2
    dataset = load_dataset(tmp_path / "out")
    assert dataset.energy_reference == ADSORPTION
    assert dataset.structures[0].energy == ENERGY - REFERENCE


def test_linear_references_are_reference_energies_of_a_recipe(database, tmp_path):
    coefficients = np.zeros(100)
    coefficients[[2, 8, 29]] = -5.8e10, -7.25, -50.0
    np.savez(tmp_path / "linear.npz", coeff=coefficients)
    block = {"name": "linear_reference", "file": str(tmp_path / "linear.npz")}
    chosen = from_dict(ReferenceEnergies, block, "reference_energies")
    assert chosen == LinearReference(str(tmp_path / "linear.npz"))
    dataset = load_dataset(database, data_energy_reference=TOTAL)
    e0 = chosen.resolve(dataset)
    assert e0 == {8: -7.25, 29: -50.0}
    assert interaction_energy(dataset.structures[0], e0) == ENERGY + 57.25
    with pytest.raises(ValueError, match="linear reference.*'adsorption' and 'total'"):
        chosen.resolve(load_dataset(database, data_energy_reference=ADSORPTION))
    coefficients[8] = 0.0
    np.savez(tmp_path / "linear.npz", coeff=coefficients)
    with pytest.raises(ValueError, match="no energy for O, not in its fit"):
        chosen.resolve(dataset)


def test_recipes_for_databases_as_released_say_what_these_hold():
    recipes = [load_recipe(path) for path in RECIPES.glob("*-oc20-*.json")]
    stated = {r.name: r.data.data_energy_reference for r in recipes if ".lmdb" in r.data.train}
    assert len(stated) == 4 and set(stated.values()) == {ADSORPTION}
