"""Reference energies: exact where they can be known, refused where they cannot."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equizoo.config import from_json, to_json
from equizoo.data import (
    FromModel,
    Given,
    IsolatedAtoms,
    LeastSquares,
    ReferenceEnergies,
    RefitFromModel,
    fit_reference_energies,
    interaction_energy,
    load_dataset,
    refit,
    total_energy,
)
from equizoo.data.reference_energies import Composition, reference_energy
from equizoo.structure import EnergyReference, Structure

E0 = {1: -13.58722278, 6: -1029.489, 7: -1484.98145686, 8: -2041.98160039}
WATER, METHANE, AMMONIA, METHANOL, HCN = (
    [8, 1, 1],
    [6, 1, 1, 1, 1],
    [7, 1, 1, 1],
    [6, 8, 1, 1, 1, 1],
    [1, 6, 7],
)


def molecule(numbers: list[int], energy: float | None = None) -> Structure:
    numbers = np.array(numbers)
    positions = np.zeros((len(numbers), 3))
    positions[:, 0] = np.arange(len(numbers))
    return Structure(numbers, positions, np.zeros((3, 3)), energy=energy)


def labelled(*molecules: list[int], e0=E0, extra: float = 0.0) -> list[Structure]:
    return [molecule(m, sum(e0[z] for z in m) + extra) for m in molecules]


@pytest.fixture
def dataset():
    """One molecule only: rank-deficient for least squares."""
    return load_dataset("formamide/test", index=":20")


@given(
    st.lists(st.floats(-3000, -1), min_size=4, max_size=4),
    st.lists(st.sampled_from([WATER, METHANE, AMMONIA, METHANOL, HCN]), max_size=20),
)
def test_least_squares_recovers_known_energies(energies, more):
    e0 = dict(zip(E0, energies, strict=True))
    fitted = fit_reference_energies(labelled(WATER, METHANE, AMMONIA, METHANOL, *more, e0=e0))
    assert fitted.keys() == e0.keys()
    np.testing.assert_allclose([fitted[z] for z in e0], energies, atol=1e-8)


def test_least_squares_skips_structures_without_energy():
    structures = [*labelled([1], WATER), molecule(METHANE)]
    assert fit_reference_energies(structures).keys() == {1, 8}
    with pytest.raises(ValueError, match="no structure has an energy"):
        fit_reference_energies([molecule(WATER)])


def test_rank_deficiency_names_the_elements_that_cannot_be_told_apart():
    structures = labelled(WATER, METHANOL, [6, 8, 1, 1, 1, 1, 7], WATER)
    with pytest.raises(ValueError, match=r"apart .* of H, C, O: 4 elements, .*H2O1, .*rank 3"):
        fit_reference_energies(structures)
    with pytest.raises(ValueError, match="minimum_norm=True"):
        fit_reference_energies(labelled(METHANE))
    fitted = fit_reference_energies(labelled(METHANE), minimum_norm=True)
    assert reference_energy(np.array(METHANE), fitted) == pytest.approx(sum(E0[z] for z in METHANE))


@given(st.lists(st.sampled_from(sorted(E0)), min_size=1, max_size=60), st.floats(-50, 50))
def test_subtracting_and_adding_give_the_energy_back(numbers, interaction):
    energy = total_energy(interaction, np.array(numbers), E0)
    structure = molecule(numbers, energy)
    assert interaction_energy(structure, E0) == pytest.approx(interaction, abs=1e-9)
    assert total_energy(interaction_energy(structure, E0), np.array(numbers), E0) == energy


def test_what_is_missing_is_listed():
    with pytest.raises(ValueError, match=r"No reference energy for F, Cl in .* H, C, N, O"):
        interaction_energy(molecule([17, 9, 1, 9], -1.0), E0)
    with pytest.raises(ValueError, match="has no energy"):
        interaction_energy(molecule([1]), E0)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.integers(1, 30))
def test_refitting_one_molecule_moves_its_mean_only(shift, frames):
    """The labels' mean offset goes into E0, spread in proportion to the atom counts."""
    counts = np.tile([4.0, 1.0], (frames, 1))  # CH4: the fit has one equation, two unknowns
    residuals = np.resize(shift, frames)
    moved = refit(E0, Composition((1, 6), counts), residuals)
    delta = {z: moved[z] - E0[z] for z in E0}
    assert 4 * delta[1] + delta[6] == pytest.approx(residuals.mean(), abs=1e-9)
    assert delta[1] == pytest.approx(4 * delta[6], abs=1e-9)  # shortest: along the composition
    assert delta[7] == delta[8] == 0


def test_refitting_recovers_shifts_of_a_rich_set():
    structures = labelled(WATER, METHANE, AMMONIA, METHANOL)
    composition = Composition.of(structures)
    shifts = np.array([0.1, -0.2, 0.3, 5.0])
    moved = refit(E0, composition, composition.counts @ shifts)
    np.testing.assert_allclose([moved[z] - E0[z] for z in E0], shifts, atol=1e-9)
    with pytest.raises(ValueError, match="for N in the data"):
        refit({1: 0.0, 6: 0.0, 8: 0.0}, composition, np.zeros(4))
    with pytest.raises(ValueError, match="finite residuals"):
        refit(E0, composition, np.full(4, np.nan))


def test_energies_of_new_elements_explain_what_they_can_before_others_move():
    composition = Composition.of(labelled(WATER, METHANE, AMMONIA, METHANOL))
    shifts = np.array([0.1, -0.2, 900.0, 5.0])  # of H, C, N, O
    moved = refit(E0, composition, composition.counts @ shifts, free=(7,))
    np.testing.assert_allclose([moved[z] - E0[z] for z in E0], shifts, atol=1e-9)

    single = Composition.of(labelled(AMMONIA, AMMONIA))
    moved = refit(E0, single, np.array([903.0, 903.0]), free=(7,))
    assert moved[1] == pytest.approx(E0[1], abs=1e-9)
    assert moved[7] - E0[7] == pytest.approx(903.0)
    with pytest.raises(ValueError, match="do not tell apart the energies of H, N, new"):
        refit(E0, single, np.zeros(2), free=(1, 7))


@dataclasses.dataclass
class Base:
    """A model whose predictions are off by a constant."""

    reference_energies: dict[int, float]
    error: float = 0.0  # [eV] label minus prediction
    placeholders: frozenset[int] = frozenset()

    def predict(self, atoms):
        return [dataclasses.replace(s, energy=s.energy - self.error) for s in atoms]


def test_each_choice_resolves_for_one_molecule(dataset):
    isolated = IsolatedAtoms().resolve(dataset)
    assert isolated == dict(dataset.isolated_atoms)
    given_ = {"H": -1.0, "C": -2.0, "N": -3.0, "O": -4.0, "F": -5.0}
    assert Given(given_).resolve(dataset) == {1: -1.0, 6: -2.0, 7: -3.0, 8: -4.0}
    with pytest.raises(ValueError, match="H, C, N, O: 4 elements, .*H3C1N1O1 have rank 1"):
        LeastSquares().resolve(dataset)
    shortest = LeastSquares(minimum_norm=True).resolve(dataset)
    mean = np.mean([s.energy for s in dataset.structures])
    assert reference_energy(dataset.structures[0].atomic_numbers, shortest) == pytest.approx(mean)
    base = dict(E0) | {9: -2700.0}
    assert FromModel().resolve(dataset, Base(base)) == base
    moved = RefitFromModel().resolve(dataset, Base(base, error=1.2))
    numbers = dataset.structures[0].atomic_numbers
    assert reference_energy(numbers, moved) - reference_energy(numbers, base) == pytest.approx(1.2)
    assert moved[9] == base[9]


@pytest.mark.parametrize(
    ("choice", "arguments", "message"),
    [
        (Given({"H": -13.6}), (), "No reference energy for C, N, O in formamide/test.*some for H"),
        (FromModel(), (Base({1: 0.0, 6: 0.0}),), "No reference energy for N, O"),
        (FromModel(), (), "no base model"),
        (FromModel(), (Base(E0, placeholders=frozenset([8])),), "O are new to the base model"),
        (RefitFromModel(), (Base({1: 0.0, 6: 0.0}),), "No reference energy for N, O"),
        (RefitFromModel(), (), "no base model"),
    ],
)
def test_choices_refuse_what_they_cannot_know(dataset, choice, arguments, message):
    with pytest.raises(ValueError, match=message):
        choice.resolve(dataset, *arguments)


def test_only_structures_with_an_energy_are_predicted(dataset):
    without = dataclasses.replace(dataset.structures[0], energy=None)
    some = dataclasses.replace(dataset, structures=(without, *dataset.structures[1:]))
    moved = RefitFromModel().resolve(some, Base(E0, error=1.2))
    numbers = dataset.structures[0].atomic_numbers
    assert reference_energy(numbers, moved) - reference_energy(numbers, E0) == pytest.approx(1.2)
    with pytest.raises(ValueError, match="no structure has an energy"):
        RefitFromModel().resolve(dataclasses.replace(dataset, structures=(without,)), Base(E0))


def test_isolated_atoms_belong_to_total_energies_and_to_all_elements(dataset):
    with pytest.raises(ValueError, match="No reference energy for C.*config_type=IsolatedAtom"):
        IsolatedAtoms().resolve(dataclasses.replace(dataset, isolated_atoms={1: 0.0}))
    other = dataclasses.replace(dataset, energy_reference=EnergyReference.ADSORPTION)
    with pytest.raises(ValueError, match="isolated-atom energies would mix"):
        IsolatedAtoms().resolve(other)


def test_least_squares_lists_elements_without_any_energy(dataset):
    structures = (*labelled([1], WATER), molecule(METHANE))
    with pytest.raises(ValueError, match="No reference energy for C in structures without energy"):
        LeastSquares().resolve(dataclasses.replace(dataset, structures=structures))


@dataclasses.dataclass(frozen=True)
class Settings:
    e0: ReferenceEnergies = IsolatedAtoms()


@pytest.mark.parametrize(
    "choice",
    [IsolatedAtoms(), LeastSquares(True), Given({"H": -13.6}), FromModel(), RefitFromModel()],
)
def test_choices_survive_in_a_configuration(choice):
    settings = Settings(choice)
    assert from_json(Settings, to_json(settings)) == settings


def test_configurations_are_corrected():
    with pytest.raises(ValueError, match="Did you mean 'least_squares'"):
        from_json(Settings, '{"e0": "least_square"}')
    with pytest.raises(ValueError, match="no chemical symbols"):
        Given({"Hx": 1.0})
