"""The commands as a stranger types them."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from flax import nnx
from safetensors.numpy import load_file

from equizoo import cli
from equizoo.data import ReferenceEnergies, load_dataset, write_structures
from equizoo.registry import MODELS
from equizoo.train import loop
from equizoo.train.progress import MEASURED, read_rows

RECIPE = {
    "name": "tiny",
    "model": {
        "architecture": "mace",
        "cutoff": 4.0,
        "channels": 2,
        "hidden_l_max": 0,
        "l_max": 1,
        "correlation": 1,
        "interactions": ["real_agnostic_residual"],
        "num_bessel": 2,
        "radial_widths": [4],
        "readout_channels": 2,
    },
    "data": {
        "train": "train.xyz",
        "num_valid": 2,
        "test": ["test.xyz"],
        "reference_energies": {"name": "least_squares", "minimum_norm": True},
    },
    "training": {"epochs": 2, "batch_size": 2},
}


def run(capsys, *arguments):
    cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        cli.main([str(argument) for argument in arguments])
    assert error.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


@pytest.mark.parametrize(
    "command",
    ["models", "describe", "products", "doctor", "train", "finetune", "evaluate", "predict", "demo"]
    + ["certify", "compare", "publish", "benchmark tensor-products", "benchmark train"]
    + ["convert mace-torch", "convert equiformer-v2", "convert tdn"]
    + [
        f"leaderboard {what}"
        for what in ("oc20-s2ef", "oc22-is2re", "oc20-is2rs", "check", "score")
    ],
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text and len(text) > 300


def test_a_reader_that_has_enough_is_no_error():
    """`equizoo models | head -1` says nothing on standard error."""
    command = [sys.executable, "-m", "equizoo.cli", "models", "--json", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_products_are_listed_with_what_they_cost(capsys, tmp_path):
    out = tmp_path / "products.json"
    run(capsys, "products", "gaunt_grid", "poisson_bracket", "--l-max", "0", "1", "--json", out)
    result = json.loads(out.read_text())
    rows = {(row["product"], row["l_max"]): row for row in result["rows"]}
    assert rows["gaunt_grid", 1]["contained"] == 4 and rows["gaunt_grid", 1]["allowed"] == 5
    assert [problem["product"] for problem in result["problems"]] == ["poisson_bracket"]
    assert "4 of 5" in run(capsys, "products", "gaunt_grid", "--l-max", "1")


def test_models_as_json_has_the_promised_keys(capsys, tmp_path):
    rows = json.loads(run(capsys, "models", "--json"))
    assert {row["name"] for row in rows} == set(MODELS)
    for row in rows:
        assert {"name", "architecture", "elements", "source"} <= set(row)
        assert row["source"] in ("bundled", "cached", "hub", "checkpoint")
    path = tmp_path / "models.json"
    assert "mace-3bpa" in run(capsys, "models", "--json", path)
    assert json.loads(path.read_text()) == rows
    assert json.loads(run(capsys, "models", "--elements", "Og", "--json")) == []


def test_describe_prints_what_the_card_says(capsys):
    text = run(capsys, "describe", "mace-3bpa")
    assert "level of theory" in text and "sha256" in text and "test_300K" in text
    facts = json.loads(run(capsys, "describe", "mace-3bpa", "--json"))
    assert facts["card"]["sha256"] == MODELS["mace-3bpa"].sha256


def test_describe_says_what_is_known_before_a_checkpoint_is_here(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path))
    text = run(capsys, "describe", "mace-off23-small")
    assert "wB97M-D3(BJ)" in text and "ASL" in text and "None" not in text
    facts = json.loads(run(capsys, "describe", "mace-off23-small", "--json"))
    assert facts["source"] == "checkpoint" and facts["checkpoint"].startswith("https://")
    message = fails(capsys, "convert", "mace-torch", "mace-off23-small", "--trust")
    assert "academic, non-commercial" in message and "--accept-license ASL" in message
    message = fails(capsys, "convert", "mace-torch", "mace-mp-0-small")
    assert "runs whatever code" in message and "--trust" in message
    assert "convert mace-torch mace-mp-0-small --trust" in message
    dump = ("convert", "mace-torch", "mace-mp-0-small", "--dump-only", "--out", tmp_path / "dump")
    assert "--dump-only: for files alone" in fails(capsys, *dump)
    raw = ("convert", "equiformer-v2", "equiformer-v2-oc22-121m", "--raw", "--level-of-theory", "x")
    assert "--raw, --level-of-theory: for files alone" in fails(capsys, *raw)
    finetune = ("finetune", "mace-mp-0-small", "frames.xyz", "--out", tmp_path / "run")
    assert "trust=True" in fails(capsys, *finetune)


def test_what_cannot_be_pinned_is_not_published_either(capsys):
    publish = ("publish", "mace-3bpa", "--repo", "org/x", "--pin", "--create-pr")
    assert "cannot be pinned" in fails(capsys, *publish)


def test_convert_makes_a_folder_that_every_command_takes(capsys, tmp_path):
    dump = Path(__file__).parent / "golden/mace_torch/density"
    out = tmp_path / "model"
    given = ("convert", "mace-torch", dump, "--out", out, "--elements", "O", "H")
    facts = json.loads(run(capsys, *given, "--level-of-theory", "PBE", "--json"))
    assert facts["elements"] == ["H", "O"] and facts["heads"] == ["bulk", "molecules"]
    assert "PBE" in run(capsys, "describe", out)
    assert "exists and is not an empty folder" in fails(capsys, *given)
    assert "--out is missing" in fails(capsys, "convert", "mace-torch", dump)
    assert "to write the dump to" in fails(capsys, "convert", "mace-torch", dump, "--dump-only")
    assert "needs no conversion" in fails(capsys, "convert", "mace-torch", "mace-3bpa")


def test_models_are_chosen_by_their_errors(capsys):
    chosen = ("models", "--dataset", "3bpa/*", "--architecture", "mace", "--json", "--max-error")
    rows = json.loads(run(capsys, *chosen, "forces_mae_meV_per_A=50"))
    assert "mace-3bpa" in {row["name"] for row in rows}
    assert all(row["metrics"] for row in rows)
    assert json.loads(run(capsys, *chosen, "forces_mae_meV_per_A=0.1")) == []
    assert "expected name=number" in fails(capsys, *chosen, "forces_mae_meV_per_A")
    assert "No card states the error 'force'" in fails(capsys, *chosen, "force=1")


def test_evaluate_writes_errors_with_units_in_the_keys(capsys, tmp_path):
    out = tmp_path / "out.json"
    text = run(
        capsys,
        "evaluate",
        "mace-3bpa",
        "formamide/test",
        "--json",
        out,
        "--plot",
        tmp_path / "p.png",
    )
    assert "float32" in text and "meV/Å" in text
    result = json.loads(out.read_text())
    for key in (
        "energy_mae_meV",
        "energy_rmse_meV",
        "forces_mae_meV_per_A",
        "forces_rmse_meV_per_A",
    ):
        assert result[key] > 0
    assert result["num_structures"] == 150
    assert result["dtype"] == "float32"
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_predict_writes_what_the_library_predicts(capsys, tmp_path):
    import equizoo
    from equizoo.data.readers import read_structures

    atoms = Atoms("CO", [[0, 0, 0], [1.2, 0, 0]])
    labelled = atoms.copy()
    old = {"energy": -1.0, "forces": np.ones((2, 3)), "free_energy": -2.0, "stress": np.ones(6)}
    labelled.calc = SinglePointCalculator(labelled, **old)
    write(tmp_path / "in.xyz", [atoms, labelled])
    out = tmp_path / "out.xyz"
    assert "2 structures" in run(capsys, "predict", "mace-3bpa", tmp_path / "in.xyz", "--out", out)
    read = read_structures(out).structures[1]
    result = equizoo.load("mace-3bpa").predict(atoms)
    assert read.energy == pytest.approx(result.energy, abs=1e-5)
    np.testing.assert_allclose(read.forces, result.forces, atol=1e-5)
    assert read.stress is None and "free_energy" not in read.info
    assert "exists" in fails(capsys, "predict", "mace-3bpa", tmp_path / "in.xyz", "--out", out)


def test_a_card_that_is_none_or_of_other_weights_is_no_work_done(capsys, tmp_path):
    import equizoo

    folder = tmp_path / "mine"
    equizoo.load("mace-3bpa").save(folder)
    for command in (("evaluate", folder, "formamide/test"), ("certify", folder)):
        assert "mine has no card" in fails(capsys, *command, "--card")
    other = tmp_path / "mace-3bpa"
    params = equizoo.load("mace-3bpa")
    state = jax.tree.map(lambda x: x * 1.001, nnx.state(params.model, nnx.Param))
    params.with_parameters(state, "mace-3bpa").save(other)
    text = fails(capsys, "evaluate", other, "formamide/test", "--card")
    assert "the card of mace-3bpa describes" in text


def test_bad_input_gives_one_clear_message_and_no_output(capsys, tmp_path):
    good = tmp_path / "good.xyz"
    write(good, Atoms("CO", [[0, 0, 0], [1.2, 0, 0]]))
    text = fails(capsys, "evaluate", "mace-3bpq", "formamide/test")
    assert "mace-3bpq" in text and "Did you mean 'mace-3bpa'" in text
    text = fails(capsys, "evaluate", "mace-3bpa", "formamid/test")
    assert "formamide/test" in text
    assert "energy" in fails(capsys, "evaluate", "mace-3bpa", good)
    gold = tmp_path / "gold.xyz"
    write(gold, Atoms("Au2", [[0, 0, 0], [2.5, 0, 0]]))
    out = tmp_path / "out.xyz"
    assert "Au" in fails(capsys, "predict", "mace-3bpa", gold, "--out", out)
    assert not out.exists()
    text = fails(capsys, "demo", "--out", tmp_path)
    assert "exists" in text
    text = fails(capsys, "evaluate", "mace-3bpa", "formamide/test", "--energy-key", "REF_energy")
    assert "REF_energy" in text


# ---- train and finetune


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a recipe and its data, and under ``base`` what training by it wrote."""
    folder = tmp_path_factory.mktemp("workplace")
    frames = load_dataset("formamide/train", index=":12").structures
    gold = dataclasses.replace(frames[0], atomic_numbers=np.full(6, 79))
    parts = {"train": frames[:8], "test": frames[8:9], "new": frames[9:], "gold": [gold] * 3}
    for name, part in parts.items():
        write_structures(folder / f"{name}.xyz", part)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        cli.main(["train", "recipe.json", "--out", "base"])
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


def test_train_shows_errors_and_writes_what_a_reader_needs(here, capsys):
    out = run(capsys, "train", "recipe.json", "--out", "base", "--resume")  # finished: reports only
    for words in ("errors of the trained model", "valid", "test.xyz", "meV/Å", "model: base/model"):
        assert words in out
    for file in ("run.json", "metrics.jsonl", "report.json", "learning_curve.png", "parity.png"):
        assert (here / "base" / file).stat().st_size > 100, file
    recipe = json.loads((here / "base" / "run.json").read_text())["recipe"]
    assert recipe["model"] == RECIPE["model"] and recipe["data"]["num_valid"] == 2
    assert json.loads(run(capsys, "describe", "base/model", "--json"))["architecture"] == "mace"


def test_a_stopped_training_is_resumed(here, capsys, monkeypatch, tmp_path):
    accumulate = loop._accumulate

    def stopped_after_the_first_step(*arguments):
        accumulate(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    command = ("train", "recipe.json", "--out", tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_accumulate", stopped_after_the_first_step)
        cli.main([str(argument) for argument in command])
    captured = capsys.readouterr()
    assert captured.out == "" and f"--out {tmp_path / 'run'} --resume" in captured.err
    assert not (tmp_path / "run" / "model").exists()
    assert "continue the run in it with resume" in fails(capsys, *command)
    assert '- "epochs": 2, + "epochs": 3' in fails(capsys, *command, "--resume", "--epochs", 3)

    result = json.loads(run(capsys, *command, "--resume", "--json"))
    assert result["folder"] == str(tmp_path / "run")
    assert (
        result["metrics"] == json.loads((tmp_path / "run" / "report.json").read_text())["metrics"]
    )
    assert set(result["metrics"]) == {"valid", "test.xyz"}
    resumed, whole = (
        [{k: v for k, v in row.items() if k not in MEASURED} for row in read_rows(folder)]
        for folder in (tmp_path / "run" / "metrics.jsonl", here / "base" / "metrics.jsonl")
    )
    assert resumed == whole and [row["epoch"] for row in whole] == [1, 2]


def test_finetune_shows_errors_before_and_after(here, capsys, tmp_path):
    command = ("finetune", "base/model", "new.xyz", "--out", tmp_path / "run", "--epochs", 1)
    options = ("--test", "test.xyz", "--old", "train.xyz", "--json", tmp_path / "errors.json")
    out = run(capsys, *command, *options)
    for words in ("before", "after", "valid", "test.xyz", "train.xyz", f"{tmp_path}/run/model"):
        assert words in out
    errors = json.loads((tmp_path / "errors.json").read_text())
    for stage in ("before", "after"):
        assert list(errors[stage]) == ["valid", "test.xyz", "train.xyz"]
        assert errors[stage]["valid"]["num_structures"] == 1  # a tenth of three, at least one
    again = json.loads(run(capsys, *command, *options[:4], "--resume", "--json"))
    assert again["after"] == errors["after"]
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["data"]["reference_energies"] == {"name": "refit_from_model"}
    result = json.loads(run(capsys, "evaluate", tmp_path / "run" / "model", "test.xyz", "--json"))
    assert result["forces_mae_meV_per_A"] == pytest.approx(
        errors["after"]["test.xyz"]["forces_mae_meV_per_A"]
    )


def test_new_elements_are_given_in_pairs(here, capsys, tmp_path):
    command = ("finetune", "base/model", "new.xyz", "--out", tmp_path / "run", "--new-elements")
    assert "expected pairs such as Si=C P=N" in fails(capsys, *command, "SiC")
    assert "with one new element twice" in fails(capsys, *command, "Si=Al", "Si=Cu")
    assert "does not know U, which new elements are to be like" in fails(capsys, *command, "Si=U")
    assert not (tmp_path / "run").exists()


def test_ways_to_fine_tune(here, capsys, tmp_path):
    """Replayed data under a head of their own, changes of low rank, an element that is new."""

    def finetune(data, out, *options):
        command = ("finetune", "base/model", data, "--epochs", 1, "--out", tmp_path / out)
        run(capsys, *command, *options, "--json", tmp_path / f"{out}.json")
        described = json.loads(run(capsys, "describe", tmp_path / out / "model", "--json"))
        return described, load_file(tmp_path / out / "model" / "model.safetensors")

    options = ("--replay", "train.xyz", "--replay-frames", 2, "--replay-labels", "data")
    described, _ = finetune("new.xyz", "replay", *options)
    assert described["heads"] == ["finetuned", "base"] and described["head"] == "finetuned"
    written = json.loads((tmp_path / "replay" / "run.json").read_text())["replay"]
    assert written["count"] == 2 and written["labels"] == "data"

    before = load_file(here / "base" / "model" / "model.safetensors")
    _, after = finetune("new.xyz", "low", "--low-rank", 1)
    changes = {name: after[name] - before[name] for name in before}
    moved = [change for change in changes.values() if change.any()]
    assert moved and all((np.linalg.matrix_rank(c, tol=1e-6) <= 1).all() for c in moved)

    frames = load_dataset("formamide/train", index=":4").structures
    for_nitrogen = [np.where(f.atomic_numbers == 7, 15, f.atomic_numbers) for f in frames]
    frames = [
        dataclasses.replace(f, atomic_numbers=z) for f, z in zip(frames, for_nitrogen, strict=True)
    ]
    write_structures(tmp_path / "phosphorus.xyz", frames)
    command = ("finetune", "base/model", tmp_path / "phosphorus.xyz", "--out", tmp_path / "none")
    text = fails(capsys, *command)
    assert "the data (train) also have P. Say which" in text and "--new-elements P=" in text
    described, _ = finetune(tmp_path / "phosphorus.xyz", "new", "--new-elements", "P=N")
    assert "P" in described["elements"]


def test_prepared_data_are_as_good_as_the_file(here, capsys, tmp_path):
    out = tmp_path / "prepared"
    command = ("prepare", "train.xyz", "test.xyz", "--out", out, "--cutoff", 4.0)
    facts = json.loads(run(capsys, *command, "--frames-per-shard", 3, "--json"))
    assert facts["frames"] == 9 and facts["atoms"] == 54 and facts["folder"] == str(out)
    assert set(facts["elements"]) == {"C", "H", "N", "O"}
    assert facts["label_coverage"]["forces"] == 1.0
    assert "9" in run(capsys, *command, "--frames-per-shard", 3)  # there already
    assert "frames_per_shard" in fails(capsys, *command)
    one = tmp_path / "one"
    assert "1 frames" in run(capsys, "prepare", "test.xyz", "--out", one).replace(
        "frame ", "frames "
    )
    errors = [
        json.loads(run(capsys, "evaluate", "base/model", data, "--json"))
        for data in ("test.xyz", one)
    ]
    assert errors[0]["forces_mae_meV_per_A"] == pytest.approx(errors[1]["forces_mae_meV_per_A"])
    write(tmp_path / "no.xyz", Atoms("CO", [[0, 0, 0], [1.2, 0, 0]]))
    assert "energy" in fails(capsys, "prepare", tmp_path / "no.xyz", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_every_choice_of_reference_energies_without_options_is_offered(here, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    text = capsys.readouterr().out
    for name in ReferenceEnergies.registry:
        assert (name in text) == (name not in ("given", "linear_reference"))  # which have options
    new, chosen = ("finetune", "base/model", "new.xyz", "--out", tmp_path), "--reference-energies"
    assert "config_type=IsolatedAtom" in fails(capsys, *new, chosen, "isolated_atoms")
    assert "least squares cannot tell apart" in fails(capsys, *new, chosen, "least_squares")
    assert "refit_from_model" in fails(capsys, *new, chosen, "refit")


def changed(section: str, **fields) -> str:
    return json.dumps(RECIPE | {section: RECIPE[section] | fields})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, "There is no recipe bad.json; expected a JSON file"),
        ("{", "bad.json is not valid JSON"),
        (json.dumps({"name": "x"}), "bad.json does not describe a valid Recipe: model: missing"),
        (changed("training", epoch=3), "training.epoch: unknown field. Did you mean 'epochs'?"),
        (changed("training", batch_size=0), "batch_size is 0, expected at least 1"),
        (changed("data", reference_energies="least_square"), "Did you mean 'least_squares'?"),
        (changed("data", train="absent.xyz"), "Unknown data set 'absent.xyz'"),
        (changed("data", test=["absent.xyz"]), "Unknown data set 'absent.xyz'"),
        (changed("data", num_valid=8), "num_valid is 8, but train.xyz has 8 frames"),
        (changed("data", keys={"energy": "E"}), "no frame has energy under the key 'E'"),
        (changed("data", reference_energies="isolated_atoms"), "No reference energy for H, C, N"),
        (changed("model", architecture="mase"), "unknown 'mase'. Did you mean 'mace'?"),
        (changed("model", channel=3), "channel: unknown field. Did you mean 'channels'?"),
        (changed("model", cutoff="4"), "cutoff: expected float, got '4' (str)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_recipe_gives_one_clear_message_and_no_folder(
    here, capsys, tmp_path, recipe, message
):
    (here / "bad.json").unlink(missing_ok=True)
    if recipe is not None:
        (here / "bad.json").write_text(recipe)
    text = fails(capsys, "train", "bad.json", "--out", tmp_path / "run")
    assert text.startswith("error:") and message in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mace-3bpq", "new.xyz"], "Unknown model 'mace-3bpq'. Did you mean 'mace-3bpa'?"),
        (["base", "new.xyz"], "config.json"),
        (["base/model", "absent.xyz"], "Unknown data set 'absent.xyz'"),
        (["base/model", "new.xyz", "--old", "absent.xyz"], "Unknown data set 'absent.xyz'"),
        (["base/model", "new.xyz", "--energy-key", "E"], "no frame has energy under the key 'E'"),
        (["base/model", "new.xyz", "--num-valid", "3"], "num_valid is 3, but new.xyz has 3 frames"),
        (["base/model", "new.xyz", "--num-valid", "0"], "num_valid is 0, expected at least 1"),
        (
            ["base/model", "new.xyz", "--valid", "test.xyz", "--num-valid", "1"],
            "either valid (a data set) or num_valid",
        ),
        (["base/model", "gold.xyz"], "also have Au"),
        (["base/model", "new.xyz", "--learning-rate", "-1"], "must be positive"),
        (["base/model", "new.xyz", "--resume"], "There is no run to resume"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_bad_fine_tuning_gives_one_clear_message_and_no_folder(
    here, capsys, tmp_path, arguments, message
):
    text = fails(capsys, "finetune", *arguments, "--out", tmp_path / "run")
    assert text.startswith("error:") and message in text
    assert not (tmp_path / "run").exists()


def test_an_existing_folder_is_refused_but_not_one_of_a_failed_start(here, capsys, tmp_path):
    new = ("finetune", "base/model", "new.xyz", "--out")
    assert "base exists and is not empty" in fails(capsys, *new, "base")
    text = fails(capsys, *new, tmp_path / "run", "--freeze", "layer.*")
    assert "'layer.*' matches no parameter" in text and "layers.0" in text
    assert "lower the rank" in fails(capsys, *new, tmp_path / "run", "--low-rank", 999)
    run(capsys, *new, tmp_path / "run", "--freeze", "layers.*", "--epochs", 1)


# ---- doctor


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Frames whose forces have the wrong sign, and a frame of the bundled test set."""
    path = tmp_path_factory.mktemp("faulty") / "faulty.xyz"
    frames = load_dataset("formamide/train", index=":120").structures
    wrong = [dataclasses.replace(s, forces=-s.forces) for s in frames]
    leaked = load_dataset("formamide/test", index="5:6").structures[0]
    write_structures(path, [*wrong, dataclasses.replace(leaked, forces=-leaked.forces)])
    return path


def test_doctor_says_what_is_wrong_and_exits_with_one(faulty, capsys, tmp_path):
    report = tmp_path / "report.json"
    command = ["doctor", str(faulty), "--against", "formamide/test", "--model", "mace-3bpa"]
    with pytest.raises(SystemExit) as error:
        cli.main([*command, "--json", str(report)])
    assert error.value.code == 1
    text = capsys.readouterr().out
    for words in ("wrong sign", "1 of its 150 frames", "121 frames, 2 errors", "mace-3bpa"):
        assert words in text
    diagnosis = json.loads(report.read_text())
    assert diagnosis["counts"]["error"] == 2 and diagnosis["frames"] == 121
    checks = {f["check"]: f for f in diagnosis["findings"]}
    assert checks["leakage into formamide/test"]["count"] == 1
    assert "elements of the model" in checks


def test_doctor_is_content_with_good_data(capsys):
    result = json.loads(run(capsys, "doctor", "formamide/train", "--json"))
    assert result["counts"]["error"] == result["counts"]["warning"] == 0
    assert "Unknown data set" in fails(capsys, "doctor", "absent.xyz")


def test_training_refuses_faulty_data_unless_told_otherwise(here, faulty, capsys, tmp_path):
    command = ("finetune", "base/model", faulty, "--out", tmp_path / "run", "--epochs", 1)
    text = fails(capsys, *command, "--freeze", "*")
    assert "not fit for training" in text and "--data-checks warn" in text
    assert not (tmp_path / "run").exists()
    recipe = json.loads((here / "recipe.json").read_text())
    recipe["data"] |= {"train": str(faulty), "num_valid": 2}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    train = ("train", tmp_path / "recipe.json", "--out", tmp_path / "trained", "--epochs", 1)
    assert "wrong sign" in fails(capsys, *train)
    cli.main([*map(str, train), "--data-checks", "warn"])
    assert "error: forces against energies" in capsys.readouterr().err
    written = json.loads((tmp_path / "trained" / "run.json").read_text())
    assert written["recipe"]["data"]["checks"] == "warn"


# ---- certify and compare


def test_a_log_shows_how_far_a_long_command_is(capsys):
    with cli._telling(every=0.0) as tell:
        tell("certify x: step [100] of 200")
    assert capsys.readouterr().err == "certify x: step [100] of 200\n"
    with cli._telling(every=1e6) as tell:
        tell("certify x: step 100 of 200")
    assert not capsys.readouterr().err


def test_certify_says_what_was_run_and_compare_puts_side_by_side(here, capsys, tmp_path):
    brief = ("--frames", "1", "--turns", "1", "--replicas", "1", "--temperatures", "100")
    brief += ("--md-picoseconds", "0.002", "--nve-picoseconds", "0")
    given = ("certify", "base/model", "--structures", "test.xyz", *brief)
    out = tmp_path / "certificate.json"
    text = run(capsys, *given, "--json", out)
    assert "size consistency" in text and "passed" in text and "failed" not in text
    certificate = json.loads(out.read_text())
    assert certificate["settings"]["md_picoseconds"] == 0.002
    verdicts = {check["name"]: check["verdict"] for check in certificate["checks"]}
    assert verdicts["rotation"] == "passed"
    assert verdicts["energy is conserved (NVE)"] == "not run" and "stable at 100 K" in verdicts
    assert "has no card" in fails(capsys, *given, "--card")

    text = run(capsys, "compare", "base/model", "local-dir:base/model", "test.xyz")
    assert "force MAE [meV/Å]" in text and "+0 ± 0, better on 0 %" in text
    assert "expected two or more" in fails(
        capsys, "compare", "base/model", "base/model", "test.xyz"
    )
