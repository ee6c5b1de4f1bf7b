"""What of a data set does not suit a model is found, by the model itself or by its card alone."""

import dataclasses

import numpy as np
import pytest

from equizoo.data import load_dataset
from equizoo.data.doctor_findings import Verdict
from equizoo.eval.doctor import ModelFacts, compare_with_model, model_facts
from equizoo.structure import EnergyReference


@pytest.fixture(scope="module")
def data():
    return load_dataset("formamide/train", index=":10")


@pytest.fixture(scope="module")
def model() -> ModelFacts:
    return model_facts("mace-3bpa")


def verdicts(data, model):
    return {f.check.removesuffix(" of the model"): f for f in compare_with_model(data, model)}


def test_data_that_suit_the_model(data, model):
    assert model.elements == (1, 6, 7, 8) and model.cutoff == 5.0
    found = verdicts(data, model)
    assert {f.verdict for f in found.values()} == {Verdict.FINE, Verdict.NOTE}
    assert "PBE" in found["level of theory"].message  # another level: a note
    same = verdicts(dataclasses.replace(data, level_of_theory="wb97x / 6-31g(d)"), model)
    assert {f.verdict for f in same.values()} == {Verdict.FINE}
    unstated = verdicts(dataclasses.replace(data, level_of_theory=""), model)
    assert unstated["level of theory"].verdict == Verdict.CANNOT_TELL


def test_elements_that_the_model_has_not_seen(data, model):
    gold = [dataclasses.replace(s, atomic_numbers=np.full(6, 79)) for s in data.structures[:3]]
    mixed = dataclasses.replace(data, structures=(*data.structures, *gold))
    finding = verdicts(mixed, model)["elements"]
    assert finding.verdict == Verdict.ERROR and finding.count == 3 and "Au" in finding.message


def test_another_energy_reference(data, model):
    other = dataclasses.replace(data, energy_reference=EnergyReference.ADSORPTION)
    finding = verdicts(other, model)["energy reference"]
    assert finding.verdict == Verdict.ERROR and finding.count == 10
    assert "total" in finding.message and "adsorption" in finding.message


def test_energies_on_another_scale_at_the_same_level(data, model):
    frames = tuple(dataclasses.replace(s, energy=s.energy / 27.2114) for s in data.structures)
    hartree = dataclasses.replace(data, structures=frames, level_of_theory=model.level_of_theory)
    assert verdicts(hartree, model)["reference energies"].verdict == Verdict.WARNING
    elsewhere = dataclasses.replace(hartree, level_of_theory="PBE")
    assert verdicts(elsewhere, model)["reference energies"].verdict == Verdict.NOTE


def test_a_checkpoint_is_known_by_its_card(data):
    model = model_facts("equiformer-v2-oc20-31m")
    assert model.energy_reference == EnergyReference.ADSORPTION
    assert model.reference_energies is None
    assert verdicts(data, model)["energy reference"].verdict == Verdict.ERROR
