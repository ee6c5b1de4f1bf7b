"""The inference form says what the model says, within the bound that it states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from flax import nnx
from models import pair_potential

import equizoo.zoo.mace as mace_file
from equizoo.eval.calculator import EquizooCalculator
from equizoo.eval.golden import golden_structures
from equizoo.eval.inference import LARGE, probes
from equizoo.eval.potential import Potential, load
from equizoo.graph import batch_frames
from equizoo.layers.radial import Agnesi
from equizoo.layers.radial_spline import RadialSpline, RadialTable
from equizoo.structure import EnergyReference
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.native import Native
from equizoo.tensor_products.so2 import SO2
from equizoo.zoo.mace import EnvelopeOn, Interaction, MACEConfig

ROUNDING = 1e-12  # of float64, for terms of order one
TOLERANCE = 3e-5  # [eV/Å] that most of these models reach at once, so that less is compiled
REFERENCES = {1: -13.6, 6: -1029.4, 8: -2042.0, 14: -7860.0}  # [eV]

VARIANTS = {
    "one element, scalars": dict(atomic_numbers=(14,), hidden_l_max=0, correlation=1),
    "density, two heads": dict(
        atomic_numbers=(1, 8),
        hidden_l_max=1,
        heads=("a", "b"),
        scale=(2.0, 3.0),
        interactions=(
            Interaction.REAL_AGNOSTIC_DENSITY,
            Interaction.REAL_AGNOSTIC_DENSITY_RESIDUAL,
        ),
    ),
    "transformed, envelope on weights": dict(
        atomic_numbers=(1, 6, 8),
        hidden_l_max=2,
        correlation=1,
        distance_transform=Agnesi(),
        envelope_on=EnvelopeOn.WEIGHTS,
    ),
}


def mace(**options) -> Potential:
    sizes = dict(
        cutoff=4.0,
        avg_num_neighbors=8.0,
        channels=16,
        l_max=2,
        correlation=2,
        num_bessel=4,
        radial_widths=(16, 24),
        readout_channels=4,
        scale=20.0,
    )
    config = MACEConfig(**(sizes | options))
    energies = {z: REFERENCES.get(z, 0.0) for z in config.atomic_numbers}
    return Potential(
        config.build(rngs=nnx.Rngs(0)),
        reference_energies=dict.fromkeys(config.heads, energies),
        energy_reference=EnergyReference.TOTAL,
        level_of_theory=dict.fromkeys(config.heads, "none"),
        name="small",
    )


@functools.cache
def compiled(name, native=True):
    """A model and its inference form, by machine code of our own or by XLA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mace_file, "machine_code_available", lambda: native)
        potential = mace(**VARIANTS[name])
        return potential, potential.compile(tolerance=TOLERANCE)


@pytest.fixture(params=[True, False], ids=["native", "xla"])
def native(request):
    return request.param


@pytest.fixture(params=list(VARIANTS))
def pair(request, native):
    return compiled(request.param, native)


@pytest.fixture
def single(native):
    return compiled("one element, scalars", native)


def others(potential, seed=1):
    """Structures like those that the bound was measured on, but not those."""
    rng = np.random.default_rng(seed)
    return [
        dataclasses.replace(s, positions=s.positions + rng.normal(0, 0.1, s.positions.shape))
        for s in probes(potential)
    ]


def test_equal_within_the_bound(pair):
    potential, form = pair
    assert 0 < form.force_bound <= TOLERANCE
    assert form.describe()["force_bound_eV_A"] == form.force_bound
    structures = others(potential)
    exact, found = (p.predict(structures, dtype="float64") for p in pair)
    for a, b in zip(exact, found, strict=True):
        bound = form.force_bound * max(LARGE, np.abs(a.forces).max()) / LARGE
        assert 0 < np.abs(a.forces - b.forces).max() <= bound
        assert abs(a.energy - b.energy) <= bound * len(a.forces)
        assert (a.stress is None) == (b.stress is None)
        if a.stress is not None:
            np.testing.assert_allclose(b.stress, a.stress, rtol=0, atol=bound)
    # float32 changes the form as little as it changes the model
    own, its = (
        max(
            np.abs(r.forces - a.forces).max()
            for r, a in zip(p.predict(structures), exact, strict=True)
        )
        for p in pair
    )
    assert its <= 2 * own + form.force_bound * LARGE
    assert np.abs(exact[0].forces).max() > 0.1


def test_by_xla_the_first_layer_sums_densities(pair, native):
    first, second = pair[1].model.layers
    assert (first.densities is not None) != native and second.densities is None
    assert hasattr(first, "radial") == hasattr(first, "linear_up") == native
    assert isinstance(second.radial, RadialTable if native else RadialSpline)
    assert isinstance(pair[1].config.tensor_product, Native) == native


def test_machine_code_is_what_runs(single, native):
    form = single[1]
    frames = [form.frame(others(form)[0])]
    graph = jax.tree.map(jnp.asarray, batch_frames(frames, form.budget(frames, "float32", 128)))
    text = form._program.lower(form._params_as("float32"), graph).as_text()
    assert ("custom_call @equizoo_" in text) == native


def test_products_of_true_harmonics_are_left_alone(monkeypatch):
    monkeypatch.setattr(mace_file, "machine_code_available", lambda: False)
    for product, summed in ((SO2(), False), (ClebschGordan(), True)):
        model = mace(atomic_numbers=(1,), tensor_product=product).model.inference_form(1e-6)
        assert (model.layers[0].densities is not None) == summed


def test_forces_are_derivatives_of_its_energy(native):
    potential, form = compiled("density, two heads", native)
    structure, step = others(potential)[-1], 1e-4
    moved = []
    for sign in (1, -1):
        for atom, axis in ((0, 0), (3, 1), (5, 2)):
            positions = structure.positions.copy()
            positions[atom, axis] += sign * step
            moved.append(dataclasses.replace(structure, positions=positions))
    results = form.predict([structure, *moved], dtype="float64")
    plus, minus = np.split(np.array([r.energy for r in results[1:]]), 2)
    forces = results[0].forces[[0, 3, 5], [0, 1, 2]]
    np.testing.assert_allclose(-(plus - minus) / (2 * step), forces, atol=1e-6 * LARGE)
    assert np.abs(forces).max() > 1e-3


@pytest.mark.parametrize("name", ["one element, scalars", "transformed, envelope on weights"])
def test_smooth_at_the_cutoff_and_between(name, native):
    potential, form = compiled(name, native)
    number, cutoff = potential.config.atomic_numbers[0], potential.config.cutoff
    # to the cutoff and over it, and over more than one piece of the splines
    distances = np.concatenate([cutoff + np.array([-0.01, -1e-4, 1e-4]), 2 + 1e-4 * np.arange(80)])
    dimers = [Atoms([number] * 2, [[0, 0, 0], [0, 0, r]]) for r in distances]
    results = form.predict(dimers, dtype="float64")
    pulls, energies = (
        np.array([getattr(r, name) for r in results]) for name in ("forces", "energy")
    )
    pulls = pulls[:, 1, 2]
    assert abs(pulls[1]) < 1e-6 and pulls[2] == 0  # curvature vanishes too
    assert abs(energies[1] - energies[2]) < 1e-9
    bends = np.diff(pulls[3:], 2)
    assert np.abs(bends).max() < 1e-6 * max(1.0, np.abs(np.diff(pulls[3:])).max() / 1e-4)


def test_padding_is_inert(single):
    _, form = single
    lone, small = Atoms("Si"), Atoms("Si2", [[0, 0, 0], [0, 0, 2.2]])
    crowd = others(form)
    together = form.predict([lone, small, *crowd], dtype="float64")
    for atoms, result in zip([lone, small], together, strict=False):
        alone = form.predict(atoms, dtype="float64")
        assert alone.energy == pytest.approx(result.energy, abs=ROUNDING * 1e4)
        np.testing.assert_allclose(alone.forces, result.forces, atol=ROUNDING)


def test_flat_edges_give_the_same(single):
    potential, form = single
    structures = others(potential)
    frames = [form.frame(s) for s in structures]
    budget = form.budget(frames, "float64", 128)
    flat = dataclasses.replace(budget, slots=None, out_slots=None, edges=64 * budget.nodes)
    slots, out_slots = (max(getattr(f, n) for f in frames) for n in ("max_in", "max_out"))
    in_rows = dataclasses.replace(
        budget, slots=slots, out_slots=out_slots, edges=slots * budget.nodes
    )
    rows, listed = (form.evaluate_batch(frames, b, "float64") for b in (in_rows, flat))
    np.testing.assert_allclose(rows.forces, listed.forces, atol=1e-10)
    np.testing.assert_allclose(rows.energy, listed.energy, atol=1e-10)


def test_elements_heads_and_reference_energies():
    options = VARIANTS["density, two heads"]
    potential = mace(**options | {"interactions": options["interactions"][:1]})
    form = potential.compile(elements=["O"], tolerance=1e-4)
    assert form.config.atomic_numbers == (8,)
    assert potential.inference is None  # what was measured is the smaller model
    structure = golden_structures(form.config)["cluster"]
    other, plain = (p.with_head("b").predict(structure) for p in (form, potential))
    assert other.energy == pytest.approx(plain.energy, abs=1e-3)
    np.testing.assert_allclose(other.forces, plain.forces, atol=1e-3)
    assert np.abs(other.forces - form.predict(structure).forces).max() > 1e-2
    shifted = form.with_reference_energies({8: 0.0}, "none")
    assert shifted.predict(structure).energy == pytest.approx(
        form.predict(structure).energy - 7 * REFERENCES[8], abs=1e-6
    )
    assert shifted.force_bound == form.force_bound


def test_calculators_use_it_where_rounding_is_larger(single, native, tmp_path, monkeypatch):
    untried = mace(**VARIANTS["one element, scalars"])
    assert untried.calculator().potential is untried
    potential, form = single
    known = potential.inference
    assert known.force_bound == form.force_bound and known.rounding > 0
    known = dataclasses.replace(known, rounding=1.1 * known.force_bound)
    monkeypatch.setattr(potential, "inference", known)
    monkeypatch.setattr(mace_file, "machine_code_available", lambda: native)
    assert potential.calculator().potential is form
    assert potential.calculator("float64").potential is potential
    assert EquizooCalculator(potential).potential is potential
    assert form.calculator("float64").potential is form

    atoms = Atoms("Si3", [[0, 0, 0], [0, 0, 2.2], [0, 2.1, 0.3]])
    potential.save(tmp_path / "model", golden=False)
    kept = load(tmp_path / "model", check_golden=False).calculator()
    assert kept.potential.force_bound == form.force_bound
    forces = [c.get_forces(atoms) for c in (kept, EquizooCalculator(potential))]
    np.testing.assert_allclose(*forces, atol=2e-5)
    lowered = potential.with_reference_energies({14: 0.0}, "none").calculator()
    assert lowered.potential.force_bound == form.force_bound
    assert lowered.get_potential_energy(atoms) == pytest.approx(
        kept.get_potential_energy(atoms) - 3 * REFERENCES[14], abs=1e-4
    )

    untried.inference = dataclasses.replace(known, rounding=known.force_bound)
    assert untried.calculator().potential is untried


@pytest.mark.parametrize(
    "change",
    [
        lambda p, folder: p.save(folder),
        lambda p, folder: p.save_pretrained(folder),
        lambda p, folder: p.push_to_hub("a/b"),
        lambda p, folder: p.with_elements(["Si"]),
        lambda p, folder: p.with_new_elements({"C": "Si"}),
        lambda p, folder: p.with_parameters(nnx.state(p.model, nnx.Param), "x"),
        lambda p, folder: p.only_head(),
        lambda p, folder: p.compile(),
    ],
)
def test_it_cannot_be_changed(single, change, tmp_path):
    with pytest.raises(ValueError, match="potential that was compiled"):
        change(single[1], tmp_path / "model")


def test_its_digest_is_another(single):
    potential, form = single
    assert form.model_sha256() != potential.model_sha256()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (pair_potential, "Pair has no inference form; use the potential as it is"),
        (
            lambda: mace(
                atomic_numbers=(1,),
                interactions=(Interaction.REAL_AGNOSTIC_ATTENTION_RESIDUAL,),
                envelope_on=EnvelopeOn.WEIGHTS,
            ),
            "see the atoms",
        ),
        (
            lambda: mace(atomic_numbers=(1, 3, 6, 7, 8, 14), distance_transform=Agnesi()),
            "6 elements.*elements=",
        ),
    ],
)
def test_models_without_such_a_form(build, message):
    with pytest.raises(ValueError, match=message):
        build().model.inference_form(1e-6)


def test_a_layer_that_sees_the_atoms_keeps_its_network():
    kinds = (Interaction.REAL_AGNOSTIC_ATTENTION_RESIDUAL, Interaction.REAL_AGNOSTIC_RESIDUAL)
    potential = mace(
        atomic_numbers=(1,), hidden_l_max=0, interactions=kinds, envelope_on=EnvelopeOn.WEIGHTS
    )
    form = potential.with_inference_form(1e-8)
    structure = golden_structures(potential.config)["crystal"]
    exact, found = (p.predict(structure, dtype="float64").forces for p in (potential, form))
    assert 0 < np.abs(exact - found).max() < 1e-6 * np.abs(exact).max()


def test_a_bound_that_cannot_be_reached(single):
    potential = mace(atomic_numbers=(1,), hidden_l_max=0, interactions=(Interaction.REAL_AGNOSTIC,))
    with pytest.raises(ValueError, match="at best, but tolerance is 1.0e-17"):
        potential.compile(tolerance=1e-17)
    with pytest.raises(ValueError, match="tolerance is 0.0 eV/Å, expected a positive number"):
        single[0].compile(tolerance=0.0)


@pytest.mark.slow
def test_the_released_model():
    potential = load("mace-3bpa", check_golden=False)
    form = potential.compile()
    assert form.force_bound < potential.inference.rounding
    structures = others(potential)
    exact, found = (p.predict(structures, dtype="float64") for p in (potential, form))
    for a, b in zip(exact, found, strict=True):
        largest = max(LARGE, np.abs(a.forces).max()) / LARGE
        assert np.abs(a.forces - b.forces).max() <= form.force_bound * largest
