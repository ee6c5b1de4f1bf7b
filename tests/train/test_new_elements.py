"""A model fine-tuned on elements that it has never seen."""

import dataclasses

import numpy as np
import pytest
from conftest import SPECIES, make_structures
from test_recipe import TRAINING

from equizoo.data.readers import write_structures
from equizoo.data.reference_energies import FromModel, RefitFromModel
from equizoo.eval.potential import load
from equizoo.train.finetune import finetune
from equizoo.train.recipe import DataConfig
from equizoo.train.replay import BASE, Replay

SILVER, OFFSET = 47, -1000.0  # [eV] of an atom, another than those known


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data with silver for copper, and the original."""
    folder, structures = tmp_path_factory.mktemp("data"), make_structures(12, seed=3)
    write_structures(folder / "old.xyz", structures)
    copper, silver = SPECIES[1], []
    for s in structures:
        numbers = np.where(s.atomic_numbers == copper, SILVER, s.atomic_numbers)
        energy = s.energy + OFFSET * np.sum(numbers == SILVER)
        silver.append(dataclasses.replace(s, atomic_numbers=numbers, energy=float(energy)))
    write_structures(folder / "new.xyz", silver)
    return str(folder / "new.xyz"), str(folder / "old.xyz")


def test_new_elements_start_as_those_they_are_like(base, tmp_path):
    larger = base.with_new_elements({"Ag": "Cu"})
    assert larger.placeholders == {SILVER} and larger.card is None
    copper = make_structures(2)[1]
    numbers = np.where(copper.atomic_numbers == 29, SILVER, copper.atomic_numbers)
    silver = dataclasses.replace(copper, atomic_numbers=numbers)
    results = base.predict(copper), larger.predict(silver), larger.predict(copper)
    energies = [result.energy for result in results]
    np.testing.assert_allclose(energies, energies[0], atol=1e-5)
    assert larger.with_elements(["Cu", "Ag"]).placeholders == {SILVER}
    with pytest.raises(ValueError, match="no reference energies for Ag yet"):
        larger.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    energies_known = dict(base.reference_energies)
    settled = larger.with_reference_energies(energies_known | {SILVER: -7.0}, "tiny")
    assert not settled.placeholders
    added = 5.0 * np.sum(numbers == SILVER)
    assert settled.predict(silver).energy == pytest.approx(energies[0] - added, abs=1e-4)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"Ag": "Au"}, "does not know Au, which new elements are to be like; .* Al, Cu"),
        ({"Cu": "Al"}, "knows Cu already"),
        ({"Xx": "Al"}, r"\['Xx'\] are no chemical symbols"),
    ],
)
def test_what_cannot_be_added_is_refused(base, like, message):
    with pytest.raises(ValueError, match=message):
        base.with_new_elements(like)


def test_fine_tuning_on_a_new_element(base, files, tmp_path):
    new, old = files
    data = DataConfig(train=new, num_valid=4, reference_energies=RefitFromModel())
    run = finetune(
        base,
        data,
        tmp_path / "run",
        training=dataclasses.replace(TRAINING, epochs=2),
        old=(old,),
        replay=Replay(data=old, count=4),
        new_elements={"Ag": "Cu"},
    )
    assert run.before["valid"]["energy_mae_meV_per_atom"] < 5000  # not the offset's 500 eV
    tuned = load(tmp_path / "run" / "model")
    assert tuned.config.atomic_numbers == (*SPECIES, SILVER)
    assert tuned.reference_energies[SILVER] == pytest.approx(OFFSET, abs=10)
    before = tuned.with_head(BASE)
    expected = dict(base.reference_energies) | {SILVER: tuned.reference_energies[SILVER]}
    assert dict(before.reference_energies) == expected
    with pytest.raises(ValueError, match="Ag are new to the base model.*refit_from_model"):
        finetune(
            base,
            dataclasses.replace(data, reference_energies=FromModel()),
            tmp_path / "refused",
            new_elements={"Ag": "Cu"},
        )
    with pytest.raises(ValueError, match="Au are to be new elements, but .* has none"):
        finetune(base, data, tmp_path / "refused", new_elements={"Ag": "Cu", "Au": "Cu"})
    with pytest.raises(ValueError, match="also have Ag. .*--new-elements Ag="):
        finetune(base, data, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
