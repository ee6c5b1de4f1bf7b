"""The speed of training, as it is measured while a run goes on."""

import csv
import json

import pytest
from conftest import make_structures
from test_recipe import MODEL

from equizoo import cli
from equizoo.data.readers import write_structures
from equizoo.train import device_clock
from equizoo.train.device_clock import DeviceClock


def test_the_time_between_steps_is_idle_unless_the_run_pauses(monkeypatch):
    monkeypatch.setattr(device_clock, "_end", lambda result: result)  # results say when they end
    clock = DeviceClock()
    clock.step(0.0, 2.0)
    clock.step(3.0, 5.0)
    clock.step(4.5, 6.0)  # asked for while the one before still ran
    assert clock.row(12) == {"idle_share": 1 / 6.5, "structures_per_s": 12 / 6.5}
    clock.step(10.0, 11.0)
    assert clock.pause() == 11.0
    clock.step(20.0, 23.0)
    assert clock.row(8) == {"idle_share": 0.0, "structures_per_s": 2.0}
    clock.close()


@pytest.fixture
def recipe(tmp_path):
    write_structures(tmp_path / "morse.xyz", make_structures(12))
    fields = {
        "name": "tiny",
        "model": MODEL,
        "data": {
            "train": str(tmp_path / "morse.xyz"),
            "num_valid": 4,
            "reference_energies": {"name": "least_squares"},
        },
        "training": {"epochs": 50, "batch_size": 2},
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(fields))
    return path


def test_throughput_of_every_combination(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "speed"
    options = ["--batch-sizes", "2", "4", "--microbatches", "2", "--epochs", "2"]
    cli.main(["benchmark", "train", str(recipe), "--out", str(out), *options])
    shown = capsys.readouterr().out
    assert "structures/s" in shown and "train.png" in shown
    with (out / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    points = [tuple(int(r[k]) for k in ("batch_size", "microbatches", "steps")) for r in rows]
    assert points == [(2, 2, 4), (4, 2, 2)]
    for row in rows:
        assert float(row["structures_per_s"]) > 0 and 0 <= float(row["idle_share"]) < 1
        assert 0 <= float(row["padding_nodes"]) < 1 and row["device"] and row["jax"]
    assert (out / "train.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        cli.main(["benchmark", "train", str(recipe), "--out", str(out)])
    assert "exists; remove it" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "1"], "expected two or more"),
        (["--microbatches", "3"], "3 microbatches cannot"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    recipe, tmp_path, capsys, options, message
):
    with pytest.raises(SystemExit):
        cli.main(["benchmark", "train", str(recipe), "--out", str(tmp_path / "speed"), *options])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "speed").exists()
