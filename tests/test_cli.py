"""The commands as a stranger types them."""

import json

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from equizoo import cli
from equizoo.registry import MODELS


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
    "command", ["models", "describe", "train", "finetune", "evaluate", "predict", "demo"]
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text and len(text) > 300


def test_models_as_json_has_the_promised_keys(capsys, tmp_path):
    rows = json.loads(run(capsys, "models", "--json"))
    assert {row["name"] for row in rows} == set(MODELS)
    for row in rows:
        assert {"name", "architecture", "elements", "source"} <= set(row)
        assert row["source"] in ("bundled", "cached", "hub")
    path = tmp_path / "models.json"
    assert "mace-3bpa" in run(capsys, "models", "--json", path)
    assert json.loads(path.read_text()) == rows
    assert json.loads(run(capsys, "models", "--elements", "Og", "--json")) == []


def test_describe_prints_what_the_card_says(capsys):
    text = run(capsys, "describe", "mace-3bpa")
    assert "level of theory" in text and "sha256" in text and "test_300K" in text
    facts = json.loads(run(capsys, "describe", "mace-3bpa", "--json"))
    assert facts["card"]["sha256"] == MODELS["mace-3bpa"].sha256


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
    write(tmp_path / "in.xyz", [atoms, atoms])
    out = tmp_path / "out.xyz"
    assert "2 structures" in run(capsys, "predict", "mace-3bpa", tmp_path / "in.xyz", "--out", out)
    read = read_structures(out).structures[1]
    result = equizoo.load("mace-3bpa").predict(atoms)
    assert read.energy == pytest.approx(result.energy, abs=1e-5)
    np.testing.assert_allclose(read.forces, result.forces, atol=1e-5)
    assert "exists" in fails(capsys, "predict", "mace-3bpa", tmp_path / "in.xyz", "--out", out)


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
