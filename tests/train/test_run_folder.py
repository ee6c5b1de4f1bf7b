"""A run goes on with its own settings and its own frames, in a folder that can be written."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import make_structures

from equizoo.config import to_dict
from equizoo.data.fingerprint import fingerprint
from equizoo.data.prepare import prepare
from equizoo.data.prepared import Chained, PreparedStructures, Selected
from equizoo.data.readers import Dataset, ReadReport, write_structures
from equizoo.structure import EnergyReference
from equizoo.train import recipe as recipe_module
from equizoo.train.config import LossWeights, Optimizer, SecondStage, TrainConfig
from equizoo.train.recipe import DataConfig, Recipe, train
from equizoo.train.run_folder import data_facts, open_run_folder, require_usable

CONSTANT = TrainConfig(epochs=4, optimizer=Optimizer(schedule="constant"))


def dataset(structures):
    return Dataset(
        structures=tuple(structures),
        energy_reference=EnergyReference.TOTAL,
        level_of_theory="none",
        isolated_atoms={},
        report=ReadReport(len(structures), len(structures), 0, {}, {}, {}),
    )


def facts(training, structures, **data):
    recipe = {"training": to_dict(training), "data": {"checks": "refuse", "test": []} | data}
    return {"recipe": recipe, "frames": data_facts({"train": dataset(structures)})}


@pytest.fixture
def folder(tmp_path):
    """Of a run that has begun."""
    folder = tmp_path / "run"
    open_run_folder(folder, facts(CONSTANT, make_structures(4)), resume=False)
    (folder / "checkpoints").mkdir()
    return folder


def test_a_fingerprint_is_of_all_that_is_trained_on_and_of_the_order():
    structures = make_structures(4)
    first = structures[0]
    whole = fingerprint(structures)
    assert fingerprint(make_structures(4)) == whole
    fixed = {"fixed": np.arange(first.num_nodes) == 0}
    for changed in (
        {"energy": first.energy + 1e-9},
        {"energy": None},
        {"stress": None},
        {"forces": -first.forces},
        {"positions": first.positions + 1e-12},
        {"cell": 2 * first.cell},
        {"pbc": (True, True, False)},
        {"charge": 1.0},
        {"head": "other"},
        {"info": fixed},
    ):
        assert fingerprint([dataclasses.replace(first, **changed), *structures[1:]]) != whole
    assert fingerprint(structures[::-1]) != whole
    assert fingerprint(structures[:3]) != whole
    renamed = [dataclasses.replace(s, name="other", info={"note": 1}) for s in structures]
    assert fingerprint(renamed) == whole
    moved = [dataclasses.replace(s, energy=0.0) for s in structures]
    assert fingerprint(moved, labels=False) == fingerprint(structures, labels=False) != whole


def test_prepared_data_are_told_apart_without_reading_a_frame(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path / "cache"))
    structures = make_structures(6)
    found = []
    for name in ("one", "same", "other"):
        if name == "other":
            structures[2].forces[0, 0] += 1e-6
        (tmp_path / "frames.xyz").unlink(missing_ok=True)
        write_structures(tmp_path / "frames.xyz", structures)
        found.append(prepare([tmp_path / "frames.xyz"], tmp_path / name).structures)

    def gone_through(structures):
        raise AssertionError("all frames are read")

    for kind in (PreparedStructures, Selected, Chained):
        monkeypatch.setattr(kind, "__iter__", gone_through)
    one, same, other = found
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    parts = [Selected(one, np.array(chosen)) for chosen in ([0, 1], [1, 0])]
    assert fingerprint(parts[0]) != fingerprint(parts[1])
    assert fingerprint(Chained(parts)) != fingerprint(Chained(parts[::-1]))


def test_other_frames_are_refused_and_the_difference_is_said(folder):
    same = facts(CONSTANT, make_structures(4))
    open_run_folder(folder, same, resume=True)
    others = facts(CONSTANT, make_structures(4, seed=1))
    old, new = (f["frames"]["train"]["sha256"][:12] for f in (same, others))
    message = f"train: 4 frames with SHA-256 {old}… then, 4 frames with SHA-256 {new}… now"
    with pytest.raises(ValueError, match=message):
        open_run_folder(folder, others, resume=True)
    with pytest.raises(ValueError, match="then, 3 frames"):
        open_run_folder(folder, facts(CONSTANT, make_structures(3)), resume=True)
    assert json.loads((folder / "run.json").read_text()) == same


def test_harmless_settings_may_change_and_are_printed(folder, capsys):
    changed = dataclasses.replace(CONSTANT, checkpoint_every=7, epochs=9, early_stop=3)
    asked = facts(changed, make_structures(4), test=["more.xyz"], checks="off")
    open_run_folder(folder, asked, resume=True)
    told = capsys.readouterr().err
    for words in ("with other settings", '"checkpoint_every": 7', '-      "epochs": 4', "more.xyz"):
        assert words in told
    assert json.loads((folder / "run.json").read_text()) == asked
    open_run_folder(folder, asked, resume=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_size": 4},
        {"seed": 1, "checkpoint_every": 7},
        {"validate_every": 2},
        {"optimizer": Optimizer(schedule="constant", learning_rate=0.02)},
    ],
)
def test_other_settings_are_refused(folder, changed):
    asked = facts(dataclasses.replace(CONSTANT, **changed), make_structures(4))
    with pytest.raises(ValueError, match="would not continue the same run") as refused:
        open_run_folder(folder, asked, resume=True)
    assert "The number of epochs" not in str(refused.value)


@pytest.mark.parametrize(
    "training",
    [
        TrainConfig(epochs=4),  # cosine
        dataclasses.replace(
            CONSTANT, second_stage=SecondStage(start=0.5, loss=LossWeights(energy=9.0))
        ),
    ],
)
def test_epochs_are_refused_where_a_schedule_is_spread_over_them(tmp_path, training):
    open_run_folder(tmp_path / "run", facts(training, make_structures(2)), resume=False)
    asked = facts(dataclasses.replace(training, epochs=5), make_structures(2))
    with pytest.raises(ValueError, match="epochs is in the learning rate or the loss of every"):
        open_run_folder(tmp_path / "run", asked, resume=True)


def test_a_run_stopped_before_its_first_checkpoint_is_resumed_or_begun_anew(tmp_path):
    given = facts(CONSTANT, make_structures(2))
    for resume in (False, True, False):
        open_run_folder(tmp_path / "run", given, resume)
    with pytest.raises(ValueError, match="no run to resume in .*absent"):
        require_usable(tmp_path / "absent", resume=True)


RECIPE = Recipe(name="x", model={}, data=DataConfig(train="unread"), training=CONSTANT)


@pytest.fixture
def nothing_is_read(monkeypatch):
    def read(*_):
        raise AssertionError("data are read before the folder is looked at")

    monkeypatch.setattr(recipe_module, "prepare_data", read)


def test_a_folder_that_cannot_be_written_stops_a_run_before_it_reads_data(
    tmp_path, monkeypatch, nothing_is_read
):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"cannot be made: .*file is a file\. Choose another"):
            train(RECIPE, out)
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((Path(path), mode)))
    with pytest.raises(ValueError, match=f"cannot be written: {tmp_path} is not writable"):
        train(RECIPE, tmp_path / "new" / "run")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path, nothing_is_read):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="is not writable"):
        train(RECIPE, tmp_path / "run")


def test_a_system_that_refuses_to_write_is_told_of(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="cannot be written: .*Read-only file system"):
        open_run_folder(tmp_path / "run", {}, resume=False)
