"""Data with errors are refused, warned of, or not looked at, as told."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from equizoo.data import load_dataset, write_structures
from equizoo.data.doctor_findings import Finding, Verdict
from equizoo.data.prepare import prepare
from equizoo.train.data_checks import DataChecks, check_data, without
from equizoo.train.recipe import DataConfig, prepare_data


@pytest.fixture(scope="module")
def faulty():
    data = load_dataset("formamide/train", index=":60")
    zero = dataclasses.replace(data.structures[4], energy=0.0)
    return dataclasses.replace(data, structures=(*data.structures[:4], zero, *data.structures[5:]))


def test_errors_are_refused_by_default_and_listed(faulty, capsys):
    more = Finding("elements of the model", Verdict.ERROR, "never seen Au", 1)
    with pytest.raises(ValueError) as error:
        check_data(faulty, [], DataChecks.REFUSE, more=[more])
    for words in ("zeroed energies", "[4]", "never seen Au", "--data-checks warn"):
        assert words in str(error.value)
    assert capsys.readouterr().err == ""


def test_warn_prints_and_off_does_not_look(faulty, capsys):
    diagnosis = check_data(faulty, [], DataChecks.WARN)
    assert [finding.check for finding in diagnosis.errors] == ["zeroed energies"]
    printed = capsys.readouterr().err
    assert "error: zeroed energies" in printed and "warning: outliers" in printed
    assert check_data(faulty, [], DataChecks.OFF) is None
    assert capsys.readouterr().err == ""


def test_reported_data_may_be_the_training_data_but_not_share_frames(capsys):
    data = load_dataset("formamide/train", index=":20")
    assert not check_data(data, [data], DataChecks.REFUSE).errors
    other = dataclasses.replace(data, structures=data.structures[3:5], name="held out")
    with pytest.raises(ValueError, match="2 of its 2 frames are in formamide/train too"):
        check_data(data, [other], DataChecks.REFUSE)


def test_prepared_data_of_equal_names_are_not_taken_for_one(tmp_path, monkeypatch):
    """Files in two folders, of one name, with a frame in both."""
    frames, found = load_dataset("formamide/train", index=":8").structures, []
    for folder, part in (("a", frames[:5]), ("b", frames[4:])):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        write_structures("frames.xyz", part)
        found.append(prepare(["frames.xyz"], tmp_path / folder / "prepared"))
    assert found[0].name == found[1].name
    with pytest.raises(ValueError, match="1 of its 4 frames are in"):
        check_data(found[0], [found[1]], DataChecks.REFUSE)
    assert not check_data(found[0], [found[0]], DataChecks.REFUSE).errors


def test_frames_of_the_test_set_are_left_out_in_any_orientation(capsys):
    data = load_dataset("formamide/train", index=":20")
    turn = Rotation.random(random_state=1).as_matrix()
    turned = [
        dataclasses.replace(s, positions=s.positions @ turn.T, forces=s.forces @ turn.T)
        for s in data.structures[3:5]
    ]
    fresh = load_dataset("formamide/train", index="30:32").structures
    test = dataclasses.replace(data, structures=(*turned, *fresh), name="held out")
    left = without(data, [test])
    assert left.structures == (*data.structures[:3], *data.structures[5:])
    assert "2 of 20 frames of formamide/train are in held out too" in capsys.readouterr().err
    assert not check_data(left, [test], DataChecks.REFUSE).errors
    with pytest.raises(ValueError, match="All frames of formamide/train are left out"):
        without(data, [data])


def test_a_recipe_leaves_out_before_it_splits(tmp_path):
    frames = load_dataset("formamide/train", index=":20").structures
    for name, part in (("train.xyz", frames), ("test.xyz", frames[8:12])):
        write_structures(tmp_path / name, part)
    test = str(tmp_path / "test.xyz")
    train = str(tmp_path / "train.xyz")
    config = DataConfig(train=train, num_valid=4, test=(test,), without=(test,))
    prepared = prepare_data(config)
    used = [*prepared.train.structures, *prepared.valid.structures]
    energies = sorted(structure.energy for structure in used)
    assert (len(prepared.train), len(prepared.valid)) == (12, 4)
    np.testing.assert_allclose(energies, sorted(s.energy for s in (*frames[:8], *frames[12:])))


def test_prepared_data_are_not_thinned_out(tmp_path):
    data = load_dataset("formamide/train", index=":8")
    write_structures(tmp_path / "frames.xyz", data.structures)
    prepared = prepare([str(tmp_path / "frames.xyz")], tmp_path / "prepared")
    with pytest.raises(ValueError, match="before 'equizoo prepare'"):
        without(prepared, [data])
