import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from ase import Atoms
from ase.build import molecule
from flax import nnx
from models import ENERGIES, cluster, crystal, mace_potential, pair_potential
from test_packing import mixed

import equizoo
from equizoo import hub
from equizoo.eval.golden import check_golden_outputs, golden_structures
from equizoo.eval.potential import Potential, describe, load
from equizoo.structure import EnergyReference, Structure

# Sums in another order: a few units in the last place of terms of order one.
ROUNDING = {"float32": 2e-5, "float64": 1e-12}


@pytest.fixture(scope="module")
def mace():
    return mace_potential(card="# A model\n")


@pytest.fixture(scope="module")
def folder(mace, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    mace.save(path)
    return path


def assert_same(a, b, tolerance):
    assert a.energy == pytest.approx(b.energy, abs=tolerance * len(a.forces))
    np.testing.assert_allclose(a.forces, b.forces, rtol=0, atol=tolerance)
    np.testing.assert_allclose(a.node_energies, b.node_energies, rtol=0, atol=tolerance)
    assert (a.stress is None) == (b.stress is None)
    if a.stress is not None:
        np.testing.assert_allclose(a.stress, b.stress, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_list_equals_one_by_one_in_order(mace, dtype):
    rng = np.random.default_rng(0)
    structures = [crystal(rng), cluster(rng, 5), Atoms("O"), cluster(rng, 11), crystal(rng)]
    together = mace.predict(structures, dtype=dtype)
    for atoms, result in zip(structures, together, strict=True):
        assert len(result.forces) == len(atoms)
        assert_same(result, mace.predict(atoms, dtype=dtype), ROUNDING[dtype])


def test_energy_is_the_float64_sum_of_node_energies(mace):
    result = mace.predict(molecule("CH3OH"))
    assert result.energy == result.node_energies.sum()
    assert result.energy == pytest.approx(sum(ENERGIES[z] for z in (6, 8, 1, 1, 1, 1)), abs=50)
    # A step of float32 at this energy is 0.25 meV; the sum does not move on that grid.
    assert float(np.float32(result.energy)) != result.energy


def test_a_lone_atom_has_its_reference_energy(mace):
    result = mace.predict(Atoms("C"))
    assert result.energy == pytest.approx(ENERGIES[6], abs=1e-5)
    assert np.abs(result.forces).max() == 0
    assert result.stress is None


def test_stress_needs_three_periodic_axes(mace):
    atoms = crystal(np.random.default_rng(1))
    assert mace.predict(atoms).stress.shape == (3, 3)
    atoms.pbc = (True, True, False)
    assert mace.predict(atoms).stress is None


def test_forces_and_stress_are_derivatives_of_the_energy(mace):
    atoms = crystal(np.random.default_rng(2))
    result = mace.predict(atoms, dtype="float64")
    step = 1e-4  # [Å], and as strain; the error of central differences is of its square

    def energies(moved):
        return [r.energy for r in mace.predict(moved, dtype="float64", batch_nodes=128)]

    displaced, strained = [], []
    for sign in (1, -1):
        for i in range(3):
            for axis in range(3):
                copy = atoms.copy()
                copy.positions[i, axis] += sign * step
                displaced.append(copy)
                copy = atoms.copy()
                strain = np.eye(3)
                strain[i, axis] += sign * step / 2
                strain[axis, i] += sign * step / 2
                copy.set_cell(copy.cell.array @ strain, scale_atoms=True)
                strained.append(copy)

    plus, minus = np.split(np.array(energies(displaced)), 2)
    forces = -(plus - minus).reshape(3, 3) / (2 * step)
    np.testing.assert_allclose(result.forces[:3], forces, atol=1e-6)
    plus, minus = np.split(np.array(energies(strained)), 2)
    stress = (plus - minus).reshape(3, 3) / (2 * step) / atoms.get_volume()
    np.testing.assert_allclose(result.stress, stress, atol=1e-6)
    assert np.abs(stress).max() > 1e-4


def test_float64_does_not_leak(mace):
    with jax.enable_x64(False):
        wide = mace.predict(cluster(np.random.default_rng(3), 9), dtype="float64")
        narrow = mace.predict(cluster(np.random.default_rng(3), 9), dtype="float32")
        assert not jax.config.jax_enable_x64
    error = np.abs(wide.forces - narrow.forces).max()
    assert 0 < error < 1e-4


def test_the_result_does_not_depend_on_the_global_switch(mace):
    atoms = crystal(np.random.default_rng(4))
    with jax.enable_x64(False):
        programs_off = mace.predict(atoms, dtype="float64"), mace.predict(atoms)
    programs = mace.num_programs
    programs_on = mace.predict(atoms, dtype="float64"), mace.predict(atoms)
    assert mace.num_programs == programs
    for off, on in zip(programs_off, programs_on, strict=True):
        assert np.array_equal(off.forces, on.forces)


def test_a_thousand_different_structures_compile_at_most_eight_programs():
    potential = pair_potential()
    structures = mixed(7, 1000)
    results = potential.predict(structures)
    assert potential.num_programs <= 8
    programs = potential.num_programs
    for i in (0, 500, 999):
        alone = pair_potential().predict(structures[i])
        assert_same(results[i], alone, ROUNDING["float32"])
    again = potential.predict(structures)
    assert potential.num_programs == programs
    assert all(a.energy == b.energy for a, b in zip(results, again, strict=True))


def test_single_calls_and_streams_share_few_programs():
    potential = pair_potential()
    rng = np.random.default_rng(8)
    for nodes in rng.integers(1, 150, 60):
        potential.predict(cluster(rng, int(nodes)))
    potential.predict(mixed(9, 100))
    assert potential.num_programs <= 8


def test_a_stream_is_read_as_it_is_consumed():
    read = []

    def source():
        for i in range(10_000):
            read.append(i)
            yield Atoms("OH", [[0, 0, 0], [0, 0, 1.0]])

    stream = pair_potential().predict_stream(source(), batch_nodes=32)
    first = next(stream)
    assert len(read) <= 16 * 32
    assert first.energy == next(stream).energy


def test_a_structure_larger_than_a_batch():
    atoms = cluster(np.random.default_rng(10), 40)
    potential = pair_potential()
    small, large = potential.predict([Atoms("H"), atoms], batch_nodes=16)
    assert_same(large, potential.predict(atoms), ROUNDING["float32"])
    assert small.energy == ENERGIES[1]


def test_progress_is_shown_when_asked_for(capsys):
    pair_potential().predict([Atoms("H")] * 3, progress=True)
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.predict(Atoms("N")), r"element\(s\) N .*knows H, C, O"),
        (lambda p: p.predict([Atoms("H"), Atoms("He")]), r"structures\[1\] has element\(s\) He"),
        (lambda p: p.predict(Atoms("H", [[0, 0, np.nan]])), "positions holds NaN"),
        (lambda p: p.predict(Atoms("H", pbc=True)), "zero volume"),
        (lambda p: p.predict([]), "no structures; expected ase.Atoms"),
        (lambda p: p.predict(Atoms("H"), dtype="bfloat16"), "'bfloat16', expected one of float32"),
        (lambda p: p.predict(Atoms("H"), batch_nodes=1), "batch_nodes is 1"),
        (lambda p: p.calculator("half"), "'half', expected one of float32"),
        (lambda p: p.frame("water.xyz", "x"), "x is a str, expected ase.Atoms"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(pair_potential())


@pytest.mark.parametrize(
    "energies", [{1: 0.0, 6: 0.0}, {1: 0.0, 6: 0.0, 7: 0.0, 8: 0.0}, {1: 0.0, 6: 0.0, 8: np.nan}]
)
def test_reference_energies_are_those_of_the_elements(energies):
    model = pair_potential().model
    with pytest.raises(ValueError, match="one finite energy for each of the model's elements H, C"):
        Potential(
            model,
            reference_energies=energies,
            energy_reference=EnergyReference.TOTAL,
            level_of_theory="",
            name="pair",
        )


def test_state_beside_parameters_is_refused():
    model = pair_potential().model
    model.table = nnx.Variable(np.zeros(3))
    with pytest.raises(ValueError, match="state beside its parameters: table"):
        Potential(
            model,
            reference_energies=ENERGIES,
            energy_reference=EnergyReference.TOTAL,
            level_of_theory="",
            name="pair",
        )


# ---- files


def test_save_and_load_round_trip_exactly(mace, folder):
    loaded = load(folder)
    assert loaded.config == mace.config
    assert loaded.reference_energies == mace.reference_energies
    assert loaded.energy_reference is EnergyReference.TOTAL
    assert (loaded.level_of_theory, loaded.card, loaded.name) == ("none", "# A model\n", "tiny")
    atoms = crystal(np.random.default_rng(5))
    fresh = mace_potential()  # neither has larger shapes compiled that it could use instead
    a, b = fresh.predict(atoms), load(folder, check_golden=False).predict(atoms)
    assert a.energy == b.energy
    assert np.array_equal(a.forces, b.forces) and np.array_equal(a.stress, b.stress)
    again = folder.with_name("again")
    loaded.save(again, golden=False)
    assert (again / hub.WEIGHTS).read_bytes() == (folder / hub.WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="holds no structures to check"):
        load(again)


def test_keys_are_paths_joined_by_dots(folder):
    keys = set(hub.load_folder(folder).arrays)
    assert {"embedding", "layers.0.product_weights", "readouts.0.kernels.0"} <= keys


def test_the_public_face(folder):
    assert equizoo.load(str(folder)).name == "tiny"
    assert equizoo.describe(f"local-dir:{folder}") == describe(folder)
    text = describe(folder)
    assert text["elements"] == ["H", "C", "O"]
    assert text["architecture"] == "mace"
    json.dumps(text)
    assert isinstance(equizoo.list_models(), list)
    assert {"load", "describe", "list_models", "Potential"} <= set(dir(equizoo))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        equizoo.laod  # noqa: B018


def test_import_brings_nothing_along():
    heavy = ["jax", "flax", "matplotlib", "grain", "orbax", "ase", "e3nn_jax"]
    code = f"import sys, equizoo; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_float64_golden_outputs(mace, folder):
    golden = hub.load_folder(folder).golden
    check_golden_outputs(mace.predict, golden, "here", dtype="float64")


def test_golden_structures_hold_every_element_and_have_neighbours(mace):
    structures = golden_structures(mace.config)
    assert {z for s in structures.values() for z in s.atomic_numbers} == {1, 6, 8}
    frames = [mace.frame(structure) for structure in structures.values()]
    assert all(frame.num_edges > frame.num_nodes for frame in frames)
    assert any(all(s.pbc) for s in structures.values())
    again = golden_structures(mace.config)
    assert all(np.array_equal(s.positions, again[n].positions) for n, s in structures.items())


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def rewrite(file, change):
    arrays = safetensors.numpy.load_file(file)
    change(arrays)
    safetensors.numpy.save_file(arrays, file)


def test_altered_weights_are_refused(folder, tmp_path):
    copy = copied(folder, tmp_path)

    def alter(arrays):
        arrays["embedding"][2] *= 1.1

    rewrite(copy / hub.WEIGHTS, alter)
    with pytest.raises(ValueError, match="does not give the outputs stored with it.*node_energies"):
        load(copy)
    assert load(copy, check_golden=False).name == "copy"


def test_nan_weights_are_refused(folder, tmp_path):
    copy = copied(folder, tmp_path)
    rewrite(copy / hub.WEIGHTS, lambda arrays: arrays["embedding"].fill(np.nan))
    with pytest.raises(ValueError, match="does not give the outputs stored with it"):
        load(copy)


def test_missing_unexpected_and_misshapen_arrays_are_listed_at_once(folder, tmp_path):
    copy = copied(folder, tmp_path)

    def alter(arrays):
        arrays["surplus"] = arrays.pop("embedding")
        arrays["layers.0.product_weights"] = np.zeros((1, 2), np.float32)

    rewrite(copy / hub.WEIGHTS, alter)
    with pytest.raises(ValueError) as error:
        load(copy)
    for problem in ("missing embedding", "unexpected surplus", "product_weights has shape (1, 2)"):
        assert problem in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("potential"), "has no 'potential'"),
        (lambda c: c["potential"].pop("level_of_theory"), "level_of_theory: missing"),
        (lambda c: c["potential"]["reference_energies"].update(Xx=1.0), "unknown elements Xx"),
        (lambda c: c["potential"]["reference_energies"].pop("H"), "given for C, O; expected"),
        (lambda c: c["potential"]["reference_energies"].update(H=-13.5), "outputs stored with it"),
        (lambda c: c["potential"].update(energy_reference="absolute"), "expected one of 'total'"),
        (lambda c: c.update(cutof=3.0), "Did you mean 'cutoff'"),
        (lambda c: c.update(cutoff=3.4), "outputs stored with it"),
    ],
)
def test_altered_configurations_are_refused(folder, tmp_path, change, message):
    copy = copied(folder, tmp_path)
    config = json.loads((copy / hub.CONFIG).read_text())
    change(config)
    (copy / hub.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_golden_outputs_with_a_part_missing(mace, folder):
    golden = hub.load_folder(folder).golden
    del golden["crystal.float32.stress"]
    with pytest.raises(ValueError, match="crystal.float32.stress is missing"):
        check_golden_outputs(mace.predict, golden, "here")
    del golden["crystal.cell"]
    with pytest.raises(ValueError, match=r"here lacks 'crystal.cell'"):
        check_golden_outputs(mace.predict, golden, "here")


def test_structures_are_accepted_as_they_are(mace):
    atoms = cluster(np.random.default_rng(6), 7)
    structure = Structure.from_atoms(atoms)
    assert mace.predict(structure).energy == mace.predict(atoms).energy


def test_a_model_of_the_zoo_has_its_card():
    assert "name: mace-3bpa" in load("mace-3bpa", check_golden=False).card


def test_the_digest_is_of_all_that_predictions_depend_on(folder):
    same, again = load(folder), load(folder)
    assert same.model_sha256() == again.model_sha256()
    energies = {z: e + 0.5 for z, e in same.reference_energies.items()}
    moved = same.with_reference_energies(energies, same.level_of_theory)
    assert moved.model_sha256() != same.model_sha256() and moved.card is None
