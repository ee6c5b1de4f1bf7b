"""Cards are made and kept up by measurements alone; prose is left as it is."""

import dataclasses
import json

import numpy as np
import pytest
from models import cluster, mace_potential
from test_evaluate import dataset

from equizoo.config import from_dict
from equizoo.eval import card as cards
from equizoo.eval.card import Provenance, make_card, read_evaluations, structures_for, update_card
from equizoo.eval.certificate import Certificate, Check, Settings
from equizoo.eval.evaluate import SAMPLE, evaluate
from equizoo.eval.speed import Speed, measure_speed
from equizoo.hub import split_front_matter
from equizoo.registry import MODELS, ModelEntry
from equizoo.structure import Structure

PROVENANCE = Provenance(
    training_data=[{"name": "toy/train", "license": "MIT", "citation": "Someone 2020"}],
    training_hardware="2 CPU cores",
    training_hours=1.25,
    license_weights="MIT",
    license_data="MIT",
    datasets=["toy"],
    limits="For nothing but tests.",
    recipe="equizoo train recipes/tiny.json --out runs/tiny",
    seeds=(0, 1),
    spread=({"seed": 1.0, "forces_rmse_meV_per_A": 2.5},),
    citation="us",
)


@pytest.fixture(scope="module")
def potential():
    return mace_potential(name="tiny")


@pytest.fixture(scope="module")
def structures(potential):
    """More than a sample of them, whose labels are off by a known amount."""
    rng = np.random.default_rng(0)
    atoms = [cluster(rng, 3) for _ in range(2 * SAMPLE + 1)]
    return [
        dataclasses.replace(
            Structure.from_atoms(a), energy=r.energy + 0.01 * i, forces=r.forces + 0.001
        )
        for i, (a, r) in enumerate(zip(atoms, potential.predict(atoms), strict=True))
    ]


@pytest.fixture(scope="module")
def evaluation(potential, structures):
    return evaluate(potential, dataset(structures, name="toy/test"))


@pytest.fixture
def certificate(potential):
    check = Check.of("rotation", {"forces_relative": 1e-12}, {"forces_relative": 1e-9}, "turned")
    return Certificate("tiny", None, "2 generated", Settings(), "cpu", {"equizoo": "0"}, (check,))


@pytest.fixture
def folder(tmp_path, potential, evaluation):
    text = make_card(potential, [evaluation], PROVENANCE, b"weights", {"Parity": "tiny/parity.png"})
    (tmp_path / "tiny.md").write_text(text)
    return tmp_path


def entry(folder) -> ModelEntry:
    fields, _ = split_front_matter((folder / "tiny.md").read_text())
    return from_dict(ModelEntry, fields)


def titles(text: str) -> list[str]:
    return [line[3:] for line in text.splitlines() if line.startswith("## ")]


def test_a_new_card_has_everything_in_order(folder, evaluation):
    text = (folder / "tiny.md").read_text()
    order = ["Use", "Errors", "Intended use and limits", "Training", "Architecture"]
    assert titles(text) == order
    found = entry(folder)
    assert (found.name, found.architecture, found.training_hours) == ("tiny", "mace", 1.25)
    (row,) = found.metrics
    assert (row["dataset"], row["split"]) == ("toy", "test")
    assert row["energy_mae_meV"] == round(evaluation.metrics["energy_mae_meV"], 4)
    for part in (
        'equizoo.load("tiny")',
        "| toy/test | 65 |",
        "| toy/test, every 3rd frame | 22 |",
        "![Parity](tiny/parity.png)",
        "For nothing but tests.",
        "    equizoo train recipes/tiny.json",
        "Seeds: 0, 1.",
        "| 1 | 2.5 |",
        "- toy/train (MIT): Someone 2020",
        "To cite the model: us",
        "- `cutoff`: `3.5`",
    ):
        assert part in text


def test_a_sample_is_of_every_so_many_th_frame(potential, structures, evaluation):
    assert evaluation.sample["every"] == 3
    again = evaluate(potential, dataset(structures[::3], name="toy/test"))
    for key, value in again.metrics.items():
        assert evaluation.sample["metrics"][key] == pytest.approx(value, rel=1e-4), key
    assert again.sample == {}, "few frames are a sample of themselves"
    assert evaluation.to_dict()["sample"] == evaluation.sample and "sample" not in again.to_dict()
    # 0.01 eV more from frame to frame
    assert evaluation.metrics["energy_mae_meV"] == pytest.approx(320, rel=1e-3)
    assert evaluation.sample["metrics"]["energy_mae_meV"] == pytest.approx(315, rel=1e-3)


def test_another_evaluation_takes_the_place_of_the_old(folder, potential, structures, evaluation):
    path = folder / "tiny.md"
    prose = "Prose that someone wrote.\n\n### Of two levels"
    path.write_text(path.read_text().replace("For nothing but tests.", prose))
    half = evaluate(potential, dataset(structures[:8], name="toy/half"))
    update_card(potential, evaluation=evaluation, folder=folder)
    update_card(potential, evaluation=half, folder=folder)
    once = path.read_text()
    update_card(potential, evaluation=half, folder=folder)
    assert path.read_text() == once
    assert [row["split"] for row in entry(folder).metrics] == ["test", "half"]
    assert [row["dataset"] for row in read_evaluations(folder / "tiny")] == ["toy/test", "toy/half"]
    assert prose in once and once.count("## Errors\n") == 1
    assert titles(once)[:3] == ["Use", "Errors", "Intended use and limits"]
    for name in ("test", "half"):
        assert f"(tiny/parity-toy-{name}.png)" in once
        assert (folder / f"tiny/parity-toy-{name}.png").stat().st_size > 1000
    assert "| toy/half | 8 |" in once


def test_a_certificate_comes_before_the_prose(folder, potential, certificate):
    with pytest.raises(ValueError, match="weights have SHA-256 None, the card"):
        update_card(potential, certificate=certificate, folder=folder)
    certificate = dataclasses.replace(certificate, sha256=entry(folder).sha256)
    for _ in range(2):
        update_card(potential, certificate=certificate, folder=folder)
    text = (folder / "tiny.md").read_text()
    assert titles(text)[1:4] == ["Errors", "Certificate", "Intended use and limits"]
    assert "| rotation | passed | forces 1e-12 of the largest (at most 1e-09) |" in text
    assert entry(folder).certificate == (
        {"check": "rotation", "verdict": "passed", "forces_relative": 1e-12},
    )
    assert Certificate.load(folder / "tiny/certificate.json") == certificate


def test_speeds_are_kept_by_device_and_precision(folder, potential):
    speed = Speed("CPU", "float32", 0.5, 0.6, 512, 14.25, 10)
    for found in (speed, speed._replace(ms_per_atom=0.4), speed._replace(device="GPU")):
        update_card(potential, speed=found, folder=folder)
    assert [(row["device"], row["ms_per_atom"]) for row in entry(folder).speed] == [
        ("CPU", 0.4),
        ("GPU", 0.5),
    ]
    text = (folder / "tiny.md").read_text()
    assert "| CPU | float32 | 0.4 | 0.6 | 512 | 14.25 | 10 |" in text
    assert titles(text)[1:3] == ["Errors", "Speed"]


def test_speed_is_that_of_a_full_batch(potential, structures):
    found = measure_speed(potential, structures, batch_nodes=50, repeats=2)
    assert found.atoms == 48 and found.repeats == 2 and found.dtype == "float32"
    assert 0 < found.ms_per_atom <= found.median_ms_per_atom
    with pytest.raises(ValueError, match="expected at least one of each"):
        measure_speed(potential, [])


def test_only_released_models_have_cards(tmp_path, potential, evaluation):
    with pytest.raises(ValueError, match="tiny has no card; expected .*tiny.md"):
        update_card(potential, evaluation=evaluation, folder=tmp_path)


def test_structures_come_from_the_card_or_from_the_package(monkeypatch, tmp_path):
    name, found = structures_for("mace-3bpa", "formamide/test")
    assert name == "formamide/test" and len(found) > 3
    monkeypatch.setenv("EQUIZOO_DATA", "")
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path))

    def no_network(source, target):
        raise ConnectionError("no network")

    monkeypatch.setattr("equizoo.data.datasets._download", no_network)
    name, found = structures_for("mace-3bpa", None)
    assert name == "mace-3bpa/replay" and len(found) > 3
    assert structures_for("mace-off23-small", None) == ("", [])


def test_a_card_without_generated_sections_gets_them(tmp_path, evaluation, potential):
    """Those of other people's checkpoints are prose alone."""
    name = "mace-mp-0-small"
    (tmp_path / f"{name}.md").write_text((MODELS.folder / f"{name}.md").read_text())
    renamed = mace_potential(name=name)
    update_card(renamed, evaluation=evaluation, folder=tmp_path)
    fields, body = split_front_matter((tmp_path / f"{name}.md").read_text())
    assert from_dict(ModelEntry, fields).metrics[0]["split"] == "test"
    assert titles(body) == ["Errors"] and "Citation: Batatia" in body.partition("## ")[0]
    assert json.loads((tmp_path / name / cards.EVALUATIONS).read_text())[0]["model"] == "tiny"
