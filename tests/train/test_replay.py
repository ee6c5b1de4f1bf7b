"""Replay: which frames, with whose labels, and that a model so fine-tuned forgets less."""

import dataclasses

import numpy as np
import pytest
from conftest import SPECIES, make_structures
from test_recipe import TRAINING

from equizoo.data.datasets import list_datasets
from equizoo.data.readers import write_structures
from equizoo.data.reference_energies import RefitFromModel
from equizoo.eval.evaluate import evaluate
from equizoo.eval.potential import load
from equizoo.graph import Budget, batch_labels, make_frame
from equizoo.train.config import LossWeights, Optimizer
from equizoo.train.finetune import finetune
from equizoo.train.forgetting import FRAMES, old_data
from equizoo.train.recipe import DataConfig
from equizoo.train.replay import BASE, HEADS, NEW, LabelsFrom, Replay, Selection, farthest, nameless

LEVEL = "tiny"


@pytest.fixture(scope="module")
def old_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("old") / "old.xyz"
    write_structures(path, make_structures(12, seed=5))
    return path


def test_the_farthest_come_first_and_equal_ones_last():
    features = np.array([[0.0, 0], [0.1, 0], [0, 0.1], [0, 0], [5, 0], [0, -9]])
    chosen = farthest(features, 6).tolist()
    assert sorted(chosen) == list(range(6))
    assert set(chosen[1:3]) == {4, 5}
    assert {chosen[-1], chosen[-2]} & {0, 3}
    assert farthest(np.zeros((3, 2)), 3).tolist() == [0, 1, 2]


def test_frames_are_chosen_and_labelled(base, old_file):
    every = Replay(data=str(old_file)).frames(base)
    assert len(every) == 12 and every.level_of_theory == LEVEL
    for structure, result in zip(every.structures, base.predict(every.structures), strict=True):
        assert structure.head == BASE
        assert structure.energy == pytest.approx(result.energy, abs=1e-5)
        np.testing.assert_allclose(structure.forces, result.forces, atol=1e-5)
    for selection in Selection:
        some = Replay(data=str(old_file), count=5, selection=selection)
        names = [s.name for s in some.frames(base).structures]
        assert len(set(names)) == 5
        assert names == [s.name for s in some.frames(base).structures]


def test_without_other_data_the_frames_left_show_what_is_forgotten(base, old_file):
    replay = Replay(data=str(old_file), count=5)
    ((name, rest),) = old_data(base, None, replay).items()
    assert name == f"{old_file}, 7 frames not replayed"
    replayed = {s.name for s in replay.frames(base).structures}
    assert len(rest) == 7 and not replayed & {s.name for s in rest.structures}
    errors = evaluate(base, nameless(rest)).metrics  # labels are the model's own
    assert errors["forces_rmse_meV_per_A"] < 0.01
    assert len(replay.rest(base, 3)) == 3
    assert old_data(base, None, Replay(data=str(old_file))) == {}  # all are replayed
    assert old_data(base, (), replay) == {} and list(old_data(base, (str(old_file),), None))


def test_of_released_models_the_data_on_the_card_are_known(monkeypatch):
    potential = load("mace-3bpa")
    ((name, dataset),) = old_data(potential, None, None).items()
    at_hand = list_datasets("3bpa/test_300K")[0].where in ("local", "cached")
    assert name == ("3bpa/test_300K, 200 of 1669 frames" if at_hand else "mace-3bpa/replay")
    assert 0 < len(dataset) <= FRAMES
    monkeypatch.setenv("EQUIZOO_DATA", "")
    monkeypatch.setenv("EQUIZOO_CACHE", "/nowhere")
    assert list(old_data(potential, None, None)) == ["mace-3bpa/replay"]
    assert old_data(load("mace-acac"), None, None) == {}


def test_what_cannot_be_replayed_is_refused(base, old_file):
    with pytest.raises(ValueError, match="has 12 frames, of which 13"):
        Replay(data=str(old_file), count=13).frames(base)
    with pytest.raises(ValueError, match="the base model is 'tiny'.*labels=model"):
        Replay(data=str(old_file), labels=LabelsFrom.DATA).frames(base)
    with pytest.raises(ValueError, match="count is 0"):
        Replay(data=str(old_file), count=0)


def test_each_head_has_its_own_reference_energies():
    structure = make_structures(1)[0]
    frames = [make_frame(structure, 4.0, SPECIES, head=head) for head in (1, 0)]
    table = np.array([[1.0, 2.0], [10.0, 20.0]])
    budget = Budget.of(frames, nodes=2 * len(structure.atomic_numbers), graphs=2)
    labels = batch_labels(frames, budget, table, np.float64)
    for g, head in enumerate((1, 0)):
        isolated = table[head][frames[g].species].sum()
        assert labels.energy[g] == pytest.approx(structure.energy - isolated)


def test_less_is_forgotten_with_replay(base, old_file, tmp_path):
    new, opinion = tmp_path / "new.xyz", tmp_path / "opinion.xyz"
    write_structures(new, make_structures(18, seed=9))
    # the base model is right about old data by definition
    labelled = Replay(data=str(old_file)).frames(base)
    write_structures(opinion, [dataclasses.replace(s, head=None) for s in labelled.structures])
    training = dataclasses.replace(
        TRAINING,
        loss=LossWeights(energy=1.0, forces=10.0),
        optimizer=Optimizer(learning_rate=0.01, ema_decay=0.9),
    )
    data = DataConfig(train=str(new), num_valid=6, reference_energies=RefitFromModel())
    naive, replayed = (
        finetune(
            base,
            data,
            tmp_path / name,
            training=dataclasses.replace(training, epochs=epochs),  # as many steps
            old=(str(opinion),),
            replay=replay,
        )
        for name, epochs, replay in (
            ("naive", 80, None),
            ("replayed", 40, Replay(data=str(old_file))),
        )
    )
    key = "forces_rmse_meV_per_A"
    assert naive.before[str(opinion)][key] < 0.01
    assert replayed.after[str(opinion)][key] < 0.1 * naive.after[str(opinion)][key]
    for run in (naive, replayed):
        assert run.after["valid"][key] < 0.2 * run.before["valid"][key]

    tuned = load(tmp_path / "replayed" / "model")
    assert tuned.config.heads == HEADS and tuned.head == NEW
    assert dict(tuned.with_head(BASE).reference_energies) == dict(base.reference_energies)
    assert tuned.with_head(BASE).level_of_theory == LEVEL
    structure = make_structures(1)[0]
    single = tuned.only_head()
    assert single.config.heads == (NEW,)
    assert single.predict(structure).energy == pytest.approx(
        tuned.predict(structure).energy, abs=1e-4
    )
    assert "replayed" in (tmp_path / "replayed" / "report.html").read_text()
