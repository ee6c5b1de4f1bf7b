"""From a recipe file to a model folder, and from there to a fine-tuned one."""

import dataclasses
import fnmatch
import json
import os
import shutil
import signal
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import make_structures
from flax import nnx

from equizoo.config import from_dict, to_dict
from equizoo.data.datasets import DATASETS
from equizoo.data.readers import write_structures
from equizoo.data.reference_energies import FromModel, Given, LeastSquares, RefitFromModel
from equizoo.eval.potential import load
from equizoo.structure import EnergyReference
from equizoo.train import recipe as recipe_module
from equizoo.train.config import LossWeights, Optimizer, TrainConfig
from equizoo.train.finetune import _say_which_energies_stay, finetune
from equizoo.train.finetune_settings import FinetuneSettings
from equizoo.train.parameter_paths import match_paths
from equizoo.train.recipe import (
    DataConfig,
    Recipe,
    complete_config,
    load_recipe,
    packed,
    prepare_data,
    train,
    untrained,
)
from equizoo.train.run_folder import open_run_folder
from equizoo.zoo._base import ArchitectureConfig
from equizoo.zoo.mace import MACEConfig

RUNNABLE = [
    path
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.json"))
    if not path.stem.endswith(".provenance")
]
MODEL = {
    "architecture": "mace",
    "format": 1,
    "cutoff": 4.0,
    "channels": 4,
    "hidden_l_max": 1,
    "l_max": 1,
    "correlation": 2,
    "radial_widths": [8],
    "num_bessel": 4,
    "readout_channels": 4,
}
TRAINING = TrainConfig(
    epochs=4,
    batch_size=3,
    loss=LossWeights(energy=1.0, forces=1.0),
    optimizer=Optimizer(learning_rate=0.02, ema_decay=0.9),
)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "morse.xyz"
    write_structures(path, make_structures(24))
    return path


@pytest.fixture(scope="module")
def recipe(data_file):
    return Recipe(
        name="tiny",
        model=MODEL,
        data=DataConfig(train=str(data_file), num_valid=6, reference_energies=LeastSquares()),
        training=TRAINING,
    )


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return train(recipe, folder)


def test_a_recipe_round_trips_through_json(recipe, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(to_dict(recipe)))
    assert load_recipe(path) == recipe
    fields = to_dict(recipe)
    fields["training"]["epoch"] = 3
    with pytest.raises(ValueError, match=r"training\.epoch: unknown field.*epochs"):
        from_dict(Recipe, fields)
    with pytest.raises(ValueError, match="There is no recipe"):
        load_recipe(tmp_path / "absent.json")


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_recipes_of_the_project_can_be_run(path):
    """Their fields are known, their data sets too, and a model can be made of them."""
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    used = {recipe.data.train, *recipe.data.test, *filter(None, [recipe.data.valid])}
    released = {name for name in used if name.startswith("oc20/")}  # archives, unpacked there
    assert all(fnmatch.filter(DATASETS, name) for name in used - released)
    fields = {"atomic_numbers": [1, 6, 7, 8], "avg_num_neighbors": 10.0} | dict(recipe.model)
    config = from_dict(ArchitectureConfig, fields, str(path))
    assert config.denoises or recipe.training.auxiliary is None
    params = nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))), nnx.Param)
    match_paths(params, recipe.training.optimizer.frozen)


def test_a_run_leaves_everything_a_reader_needs(trained):
    folder = trained.folder
    pages = ("learning_curve.png", "parity.png", "report.html")
    for name in ("run.json", "metrics.jsonl", "report.json", *pages):
        assert (folder / name).stat().st_size > 100, name
    report = json.loads((folder / "report.json").read_text())
    assert report["metrics"]["valid"]["forces_rmse_meV_per_A"] > 0
    loaded = load(folder / "model")
    structure = make_structures(3, seed=5)[2]
    assert loaded.predict(structure).energy == trained.potential.predict(structure).energy


def test_what_the_recipe_leaves_out_comes_from_the_data(recipe):
    data = prepare_data(recipe.data)
    config = complete_config(MODEL, data)
    forces = np.concatenate([s.forces for s in data.train.structures])
    assert config.atomic_numbers == (13, 29)
    assert config.scale == pytest.approx(np.sqrt(np.mean(forces**2)))
    assert 1.0 <= config.avg_num_neighbors < 20
    assert complete_config(MODEL | {"scale": 2.0}, data).scale == 2.0
    with pytest.raises(ValueError, match="cutoff: missing, expected float"):
        complete_config({k: v for k, v in MODEL.items() if k != "cutoff"}, data)
    with pytest.raises(ValueError, match="cutoff: expected float, got '4.0'"):
        complete_config(MODEL | {"cutoff": "4.0"}, data)


@pytest.mark.parametrize(("cost", "flat"), [(0.0, True), (100.0, False)])
def test_edges_of_a_batch_are_stored_as_is_cheaper_for_the_model(recipe, monkeypatch, cost, flat):
    monkeypatch.setattr(MACEConfig, "cost_of_flat", cost)
    data = prepare_data(recipe.data)
    _, _, packing = packed(untrained(recipe, data), data, TRAINING)
    assert (packing.budget.slots is None) == flat


def test_the_split_is_disjoint_complete_and_repeatable(recipe):
    first, again = prepare_data(recipe.data), prepare_data(recipe.data)
    names = [s.name for s in (*first.train.structures, *first.valid.structures)]
    assert len(set(names)) == 24 and len(first.valid) == 6
    assert names == [s.name for s in (*again.train.structures, *again.valid.structures)]
    other = dataclasses.replace(recipe.data, split_seed=1)
    assert [s.name for s in prepare_data(other).valid.structures] != names[18:]
    with pytest.raises(ValueError, match="num_valid is 24, but .* has 24 frames"):
        prepare_data(dataclasses.replace(recipe.data, num_valid=24))
    with pytest.raises(ValueError, match="either valid .* or num_valid"):
        DataConfig(train="x", valid="y", num_valid=6)
    with pytest.raises(ValueError, match="num_valid is 0, expected at least 1"):
        DataConfig(train="x", num_valid=0)
    tenth = prepare_data(dataclasses.replace(recipe.data, num_valid=None))
    assert (len(tenth.train), len(tenth.valid)) == (22, 2)


def test_fewer_frames_to_train_on_are_among_more_and_leave_validation_alone(recipe, data_file):
    def prepared(count, **changed):
        return prepare_data(dataclasses.replace(recipe.data, num_train=count, **changed))

    few, many, every = (prepared(count) for count in (5, 12, None))
    names = [{s.name for s in data.train.structures} for data in (few, many, every)]
    assert [len(n) for n in names] == [5, 12, 18] and names[0] < names[1] < names[2]
    assert [s.name for s in few.valid.structures] == [s.name for s in every.valid.structures]
    named = prepared(5, valid=str(data_file), num_valid=None)
    assert (len(named.train), len(named.valid)) == (5, 24)
    with pytest.raises(ValueError, match="num_train is 19, but .* has 18 frames to train on"):
        prepared(19)
    with pytest.raises(ValueError, match="num_train is 0, expected at least 1"):
        prepared(0)


def test_a_sample_of_the_test_frames_can_be_reported_on(recipe, data_file):
    def frames(count):
        data = dataclasses.replace(recipe.data, test=(str(data_file),), num_test=count)
        return [s.name for s in prepare_data(data).test[str(data_file)].structures]

    few, many, every = frames(5), frames(12), frames(None)
    assert len(few) == 5 and many[:5] == few and set(many) < set(every) and len(every) == 24
    assert sorted(frames(100)) == sorted(every)
    with pytest.raises(ValueError, match="num_test is 0, expected at least 1"):
        frames(0)


def test_an_existing_folder_is_not_overwritten_and_drift_is_shown(recipe, trained):
    with pytest.raises(ValueError, match="exists and is not empty"):
        train(recipe, trained.folder)
    changed = dataclasses.replace(recipe, training=dataclasses.replace(TRAINING, batch_size=4))
    with pytest.raises(ValueError, match=r'-.*"batch_size": 3(.|\n)*\+.*"batch_size": 4'):
        train(changed, trained.folder, resume=True)
    with pytest.raises(ValueError, match="no run to resume"):
        train(recipe, trained.folder.parent / "absent", resume=True)


def test_a_run_that_failed_before_it_began_leaves_its_folder_free(recipe, tmp_path):
    folder = tmp_path / "run"
    missing = dataclasses.replace(recipe.data, test=("no/such/set",))
    with pytest.raises(ValueError, match="no/such/set"):
        train(dataclasses.replace(recipe, data=missing), folder)
    assert not folder.exists()
    frozen = dataclasses.replace(TRAINING, optimizer=Optimizer(frozen=("layer.*",)))
    with pytest.raises(ValueError, match="matches no parameter"):
        train(dataclasses.replace(recipe, training=frozen), folder)
    open_run_folder(folder, {"another": "run"}, resume=False)
    assert json.loads((folder / "run.json").read_text()) == {"another": "run"}


def test_a_stop_while_the_finished_run_is_evaluated_is_made_good_by_resuming(
    recipe, trained, monkeypatch
):
    def stopped(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    report = (trained.folder / "report.json").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(recipe_module, "evaluate", stopped)
        assert train(recipe, trained.folder, resume=True) is None
    assert signal.getsignal(signal.SIGTERM) is before
    (trained.folder / "report.json").unlink()
    again = train(recipe, trained.folder, resume=True)
    assert again.metrics == trained.metrics
    figures = [json.loads(text) for text in (report, (again.folder / "report.json").read_text())]
    assert [f | {"hours": 0} for f in figures[:1]] == [f | {"hours": 0} for f in figures[1:]]


def test_a_stop_before_the_run_begins_leaves_no_folder(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_module, "examine_run", lambda *_: os.kill(os.getpid(), 15))
    assert train(recipe, tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


def test_other_frames_under_the_same_path_are_refused(recipe, data_file, trained, tmp_path):
    """Found out before anything is compiled: frames are as many, one force is another."""
    folder, data = tmp_path / "run", tmp_path / "morse.xyz"
    data.write_bytes(data_file.read_bytes())
    here = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=str(data)))
    shutil.copytree(trained.folder, folder)
    facts = json.loads((folder / "run.json").read_text())
    facts["recipe"] = to_dict(here)
    (folder / "run.json").write_text(json.dumps(facts))
    assert train(here, folder, resume=True).metrics == trained.metrics
    structures = make_structures(24)
    structures[5].forces[0, 0] += 1e-6
    data.unlink()
    write_structures(data, structures)
    with pytest.raises(ValueError, match=r"other data.*(train|valid): \d+ frames with SHA-256 \w+"):
        train(here, folder, resume=True)


def test_the_model_of_a_run_is_written_once_and_anew_when_it_changed(trained, tmp_path):
    """As it does when a finished run goes on for more epochs."""
    folder = tmp_path / "model"
    shutil.copytree(trained.folder / "model", folder)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    recipe_module._save(trained.potential, folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    params = jax.tree.map(lambda x: 1.01 * x, nnx.state(trained.potential.model, nnx.Param))
    longer = trained.potential.with_parameters(params, trained.potential.name)
    recipe_module._save(longer, folder)
    assert load(folder).model_sha256() == longer.model_sha256()


def test_elements_that_are_not_trained_on_are_named_before_training(recipe, tmp_path):
    """Those of named sets are refused, those split off are warned of."""
    structures = make_structures(6, seed=4)
    numbers = np.where(structures[1].atomic_numbers == 29, 47, structures[1].atomic_numbers)
    silver = dataclasses.replace(structures[1], atomic_numbers=numbers)
    assert 47 in numbers
    write_structures(tmp_path / "silver.xyz", [silver])
    for options in (
        {"test": (str(tmp_path / "silver.xyz"),)},
        {"valid": str(tmp_path / "silver.xyz"), "num_valid": None},
    ):
        other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **options))
        with pytest.raises(ValueError, match="^Ag: in .* data, but in no frame to train on"):
            untrained(other, prepare_data(other.data))
    data = prepare_data(recipe.data)
    data = dataclasses.replace(
        data, valid=dataclasses.replace(data.valid, structures=(silver, *data.valid.structures))
    )
    with pytest.warns(UserWarning, match="^Ag: in valid data.*split_seed"):
        potential = untrained(recipe, data)
    assert set(potential.reference_energies) == {13, 29, 47}
    more = dataclasses.replace(recipe, model=MODEL | {"atomic_numbers": [13, 29, 79]})
    with pytest.raises(ValueError, match="No reference energy for Au in the model"):
        untrained(more, prepare_data(recipe.data))
    refit = dataclasses.replace(recipe.data, reference_energies=RefitFromModel())
    with pytest.warns(UserWarning, match="^Ag: in valid data.*stay the base model's"):
        _say_which_energies_stay(data, refit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _say_which_energies_stay(data, dataclasses.replace(refit, reference_energies=FromModel()))


def test_refitted_reference_energies_remove_the_mean_error(trained, data_file, recipe):
    data = prepare_data(recipe.data)
    shifted = dataclasses.replace(
        data.train,
        structures=tuple(
            dataclasses.replace(
                s, energy=s.energy + 3.0 * (s.atomic_numbers == 13).sum() - 5.0 * s.num_nodes
            )
            for s in data.train.structures
        ),
    )
    base = trained.potential
    e0 = RefitFromModel().resolve(shifted, base)
    unshifted = RefitFromModel().resolve(data.train, base)
    assert e0[13] - unshifted[13] == pytest.approx(-2.0, abs=1e-4)
    assert e0[29] - unshifted[29] == pytest.approx(-5.0, abs=1e-4)


def test_fine_tuning_improves_new_data_reports_old_and_leaves_the_base_alone(
    trained, data_file, tmp_path, monkeypatch
):
    read = []
    load_dataset = recipe_module.load_dataset
    monkeypatch.setattr(
        recipe_module,
        "load_dataset",
        lambda name, keys, **_: read.append(name) or load_dataset(name),
    )
    shifted = [
        dataclasses.replace(s, energy=s.energy + 7.0 * s.num_nodes)
        for s in make_structures(24, seed=9)
    ]
    new = tmp_path / "new.xyz"
    test = tmp_path / "test.xyz"
    write_structures(new, shifted[:20])
    write_structures(test, shifted[20:])
    before = trained.potential.predict(shifted[0]).energy
    result = finetune(
        trained.potential,
        DataConfig(
            train=str(new), num_valid=6, test=(str(test),), reference_energies=RefitFromModel()
        ),
        tmp_path / "run",
        training=dataclasses.replace(TRAINING, epochs=6),
        old=(str(data_file),),
    )
    assert read == [str(new), str(test)]
    assert list(result.before) == list(result.after) == ["valid", str(test), str(data_file)]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["before"] == result.before and report["after"] == result.after
    key = "forces_rmse_meV_per_A"
    for stage in ("before", "after"):
        for where in ("valid", str(data_file)):
            assert set(report[stage][where][f"{key}_by_element"]) == {"Al", "Cu"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"forgotten shows on data of the base model's kind: {data_file}." in page
    assert result.after["valid"][key] < result.before["valid"][key]
    # the constant of 7 eV per atom is gone before any weight moves
    assert result.before["valid"]["energy_mae_meV_per_atom"] < 2000
    assert trained.potential.predict(shifted[0]).energy == before
    assert load(tmp_path / "run" / "model").predict(shifted[0]).energy == pytest.approx(
        result.run.potential.predict(shifted[0]).energy
    )


def test_fine_tuning_is_not_resumed_from_another_base(trained, data_file, tmp_path):
    """Its reference energies are the base's, so that labels would change on the way."""
    data = DataConfig(
        train=str(data_file), num_valid=6, reference_energies=Given({"Al": 0.0, "Cu": 0.0})
    )
    training = dataclasses.replace(TRAINING, epochs=1)
    finetune(trained.potential, data, tmp_path / "run", training=training)
    params = jax.tree.map(lambda x: 1.01 * x, nnx.state(trained.potential.model, nnx.Param))
    other = trained.potential.with_parameters(params, trained.potential.name)
    with pytest.raises(ValueError, match="would not continue the same run(.|\n)*model_sha256"):
        finetune(other, data, tmp_path / "run", training=training, resume=True)


def test_stress_labels_that_the_loss_leaves_out_are_told(trained, data_file, tmp_path):
    structures = [
        dataclasses.replace(s, stress=0.01 * (1 + i) * np.eye(3))
        for i, s in enumerate(make_structures(36, seed=2)[::3])  # those that are periodic
    ]
    write_structures(tmp_path / "new.xyz", structures)
    data = DataConfig(
        train=str(tmp_path / "new.xyz"),
        num_valid=4,
        reference_energies=Given({"Al": 0.0, "Cu": 0.0}),
    )
    with pytest.warns(UserWarning, match="12 structures have stress labels.*--stress-weight"):
        finetune(trained.potential, data, tmp_path / "run", training=FinetuneSettings(epochs=1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stress labels")
        training = FinetuneSettings(epochs=1, stress_weight=1.0)
        finetune(trained.potential, data, tmp_path / "weighed", training=training)


def test_frozen_layers_of_a_fine_tuned_model_are_the_base_models(trained, data_file, tmp_path):
    training = dataclasses.replace(
        TRAINING, epochs=1, optimizer=Optimizer(frozen=("layers.*", "embedding"))
    )
    data = DataConfig(
        train=str(data_file), num_valid=6, reference_energies=Given({"Al": 0.0, "Cu": 0.0})
    )
    result = finetune(trained.potential, data, tmp_path / "run", training=training)
    base, tuned = (
        dict(nnx.to_flat_state(nnx.state(p.model, nnx.Param)))
        for p in (trained.potential, result.run.potential)
    )
    for path, value in base.items():
        same = np.array_equal(np.asarray(value[...]), np.asarray(tuned[path][...]))
        assert same == (path[0] in ("layers", "embedding")), path


def test_energies_of_another_kind_are_refused(trained, data_file, tmp_path, monkeypatch):
    original = recipe_module.load_dataset

    def adsorption(*args, **kwargs):
        dataset = original(*args, **kwargs)
        return dataclasses.replace(dataset, energy_reference=EnergyReference.ADSORPTION)

    monkeypatch.setattr(recipe_module, "load_dataset", adsorption)
    data = DataConfig(train=str(data_file), num_valid=6, reference_energies=RefitFromModel())
    with pytest.raises(ValueError, match="mix two energy references, 'total' and 'adsorption'"):
        finetune(trained.potential, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
