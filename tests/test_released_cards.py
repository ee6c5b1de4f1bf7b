"""What the cards of the released models print is what their weights give."""

import dataclasses

import pytest

from equizoo.data.datasets import list_datasets, load_dataset
from equizoo.eval.card import CERTIFICATE, errors_section, read_evaluations
from equizoo.eval.certificate import Certificate
from equizoo.eval.evaluate import evaluate
from equizoo.eval.potential import load
from equizoo.hub import split_front_matter
from equizoo.registry import MODELS

BUNDLED = [name for name, entry in MODELS.items() if entry.source == "bundled"]
# Sums in another order, on another processor: the printed figures have three to five digits.
SAME = {"rel": 2e-3, "abs": 2e-3}
# Two roundings in float32 of what an atom has, some 4 to 8 eV; all atoms' may be of one sign.
ROUNDING_PER_ATOM = 1e-3  # [meV]


def evaluations(name):
    return read_evaluations(MODELS.folder / name)


def pairs():
    return [(name, row["dataset"]) for name in BUNDLED for row in evaluations(name)]


def test_every_bundled_model_was_evaluated():
    assert BUNDLED
    for name in BUNDLED:
        listed = [f"{row['dataset']}/{row['split']}" for row in MODELS[name].metrics]
        assert listed == [row["dataset"] for row in evaluations(name)] != []


@pytest.mark.parametrize("name", BUNDLED)
def test_cards_print_what_was_measured(name):
    text = (MODELS.folder / f"{name}.md").read_text("utf-8")
    fields, body = split_front_matter(text)
    rows = evaluations(name)
    assert errors_section(rows, {}).strip() in body
    for row, printed in zip(rows, fields["metrics"], strict=True):
        numbers = {key: value for key, value in printed.items() if not isinstance(value, str)}
        assert numbers == {key: round(row["metrics"][key], 4) for key in numbers}
    for address in [part.partition(")")[0] for part in body.split("](")[1:]]:
        if address.endswith(".png"):
            assert (MODELS.folder / address).is_file(), address


@pytest.mark.parametrize("name", BUNDLED)
def test_what_lies_beside_a_card_is_of_these_weights(name):
    """Pictures of earlier weights would be published with them, and replayed labels be wrong."""
    text = MODELS.text(name)
    pictures = {file.name for file in (MODELS.folder / name).glob("*.png")}
    assert pictures == {
        address.rpartition("/")[2]
        for address in (part.partition(")")[0] for part in text.split("](")[1:])
        if address.endswith(".png")
    }
    assert MODELS[name].parameters <= 1.4e6
    if replayed := list_datasets(f"{name}/replay"):
        frames = load_dataset(replayed[0].name, index="::20")
        metrics = evaluate(load(name), frames).metrics
        assert metrics["energy_mae_meV"] < 0.2 and metrics["forces_mae_meV_per_A"] < 0.1


@pytest.mark.slow  # so as users compile: float32 rounds otherwise in code that is not optimised
@pytest.mark.parametrize(("name", "dataset"), pairs())
def test_a_sample_of_the_errors_comes_out_again(name, dataset):
    (row,) = [row for row in evaluations(name) if row["dataset"] == dataset]
    if list_datasets(dataset)[0].where not in ("bundled", "local", "cached"):
        pytest.skip(f"{dataset} is not in EQUIZOO_DATA")
    frames = load_dataset(dataset)
    sample = row.get("sample") or {"every": 1, "metrics": row["metrics"]}
    chosen = dataclasses.replace(frames, structures=frames.structures[:: sample["every"]])
    found = evaluate(load(name), chosen, dtype=row["dtype"]).metrics
    num_atoms = max(structure.num_nodes for structure in chosen.structures)
    whole = SAME | {"abs": max(SAME["abs"], num_atoms * ROUNDING_PER_ATOM)}
    for key, value in sample["metrics"].items():
        tolerance = whole if key in ("energy_mae_meV", "energy_rmse_meV") else SAME
        assert found[key] == pytest.approx(value, **tolerance), key


@pytest.mark.parametrize("name", BUNDLED)
def test_certificates_are_of_these_weights_and_none_failed(name):
    file = MODELS.folder / name / CERTIFICATE
    entry = MODELS[name]
    assert file.is_file() == bool(entry.certificate)
    if not file.is_file():
        return
    certificate = Certificate.load(file)
    assert certificate.sha256 == entry.sha256
    assert certificate.failed == ()
    assert [row["check"] for row in entry.certificate] == [c.name for c in certificate.checks]
    assert certificate.markdown().strip() in (MODELS.folder / f"{name}.md").read_text("utf-8")
