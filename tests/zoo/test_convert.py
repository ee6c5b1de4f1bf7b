"""Dumps of mace-torch models, made by tests/golden/make_mace_torch.py, against its outputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from ase import Atoms

from equizoo.eval import convert_mace_torch as to
from equizoo.eval.potential import load
from equizoo.tensor_products._base import natural_irreps
from equizoo.tensor_products._symmetric import symmetric_basis
from equizoo.zoo._convert.mace_torch import change_of_basis, convert, read_dump

GOLDEN = Path(__file__).parent.parent / "golden" / "mace_torch"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir())
ENERGY, FORCES = 1e-10, 1e-9  # relative, float64: the same sums in another order


def outputs(name):
    """Structures and what mace-torch says of them."""
    for row in json.loads((GOLDEN / name / "outputs.json").read_text("utf-8")):
        atoms = Atoms(row["numbers"], row["positions"], cell=row["cell"], pbc=row["pbc"])
        atoms.info = row["info"]
        yield atoms, row


def assert_equal(result, row):
    np.testing.assert_allclose(result.energy, row["energy"], rtol=ENERGY)
    for found, expected in ((result.forces, row["forces"]), (result.stress, row["stress"])):
        assert (found is None) == (expected is None)
        if expected is not None:
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=0, atol=FORCES * scale)


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_mace_torch(name):
    potential = to.convert_mace_torch(GOLDEN / name)
    structures, rows = zip(*outputs(name), strict=True)
    for found, row in zip(potential.predict(structures, dtype="float64"), rows, strict=True):
        assert_equal(found, row)


def test_heads_are_saved_and_read_back(tmp_path):
    potential = to.convert_mace_torch(GOLDEN / "density", level_of_theory="PBE")
    assert potential.describe()["heads"] == ["bulk", "molecules"] and potential.head == "bulk"
    other = potential.with_head("molecules")
    assert other.reference_energies != potential.reference_energies
    other.save(tmp_path / "model", golden=False)
    again = load(tmp_path / "model", check_golden=False)
    assert again.head == "molecules" and again.level_of_theory == "PBE"
    assert again.reference_energies == other.reference_energies
    assert load(tmp_path / "model", check_golden=False, head="bulk").head == "bulk"
    atoms, row = next(outputs("density"))
    single = again.only_head()
    del atoms.info["head"]
    assert single.config.heads == ("molecules",)
    assert_equal(single.predict(atoms, dtype="float64"), row)
    with pytest.raises(ValueError, match="head is 'x', expected one of bulk, molecules"):
        potential.with_head("x")
    with pytest.raises(ValueError, match="given for bulk; expected them for each of the model's"):
        type(potential)(
            potential.model,
            reference_energies=potential.reference_energies,
            energy_reference=potential.energy_reference,
            level_of_theory="PBE",
        )


def test_fewer_elements():
    potential = to.convert_mace_torch(GOLDEN / "density", elements=["O", "H"])
    assert potential.describe()["elements"] == ["H", "O"]
    whole = to.convert_mace_torch(GOLDEN / "density")
    atoms, _ = next(outputs("density"))
    atoms.numbers[atoms.numbers == 6] = 1
    found, expected = (p.predict(atoms, dtype="float64") for p in (potential, whole))
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-13)
    np.testing.assert_allclose(found.forces, expected.forces, atol=1e-12)
    with pytest.raises(ValueError, match="does not have Fe; expected some of H, O"):
        potential.with_elements(["Fe"])


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def dump(tmp_path):
    """A dump that a test may spoil: (folder, change of settings, change of arrays)."""
    shutil.copytree(GOLDEN / "agnostic", tmp_path / "dump")
    folder = tmp_path / "dump"

    def change(settings=None, arrays=None):
        if settings is not None:
            read = json.loads((folder / "mace.json").read_text())
            settings(read)
            (folder / "mace.json").write_text(json.dumps(read))
        if arrays is not None:
            read = safetensors.numpy.load_file(folder / "mace.safetensors")
            arrays(read)
            safetensors.numpy.save_file(read, folder / "mace.safetensors")
        return folder

    return change


SETTINGS = {
    "version": (lambda s: s.update(version=2), "has format 'equizoo-mace-dump', version 2"),
    "even": (lambda s: s["model"].update(use_so3=True), "even parity only"),
    "block": (
        lambda s: s["model"]["interactions"][0].update({"class": "MyBlock"}),
        "a layer is a MyBlock, which has no counterpart",
    ),
    "readout": (
        lambda s: s["model"]["readouts"][1].update({"class": "MyReadout"}),
        "the last readout is a MyReadout",
    ),
    "constant": (
        lambda s: s["model"]["interactions"][0]["activations"].update(radial=["silu", 1.6765]),
        "an activation is 1.6765 x silu, not 1.679",
    ),
    "irreps": (
        lambda s: s["model"]["interactions"][1].update(node_irreps="2x0e+2x2e"),
        "not C x",
    ),
    "transform": (
        lambda s: s["model"].update(distance_transform="MyTransform"),
        "lacks the array radial_embedding.distance_transform.covalent_radii",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_without_counterpart(dump, name):
    change, message = SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        convert(read_dump(dump(change)))


def test_arrays_that_are_missing_or_left_over(dump):
    folder = dump(arrays=lambda a: a.update(extra=np.zeros(3)))
    with pytest.raises(ValueError, match="the model has arrays extra, which has no counterpart"):
        convert(read_dump(folder))
    folder = dump(arrays=lambda a: (a.pop("extra"), a.pop("products.1.linear.weight")))
    with pytest.raises(ValueError, match="lacks the array products.1.linear.weight"):
        convert(read_dump(folder))
    (folder / "mace.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_dump(folder)
    (folder / "mace.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks mace.safetensors"):
        read_dump(folder)


def test_couplings_of_another_space_are_refused(dump):
    def spoil(arrays):
        key = "products.0.symmetric_contractions.contractions.1.U_matrix_2"
        arrays[key] = arrays[key] + 1e-9 * np.random.default_rng(0).normal(size=arrays[key].shape)

    with pytest.raises(ValueError, match="layer 0, 1o, order 2: couplings .* leave a residual of"):
        convert(read_dump(dump(arrays=spoil)))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_change_of_basis_is_the_identity_on_our_own(order):
    """Our polynomials written as couplings, unsymmetric on purpose: all weight on one order."""
    from equizoo.tensor_products._symmetric import monomials

    irreps, ir = natural_irreps(2), natural_irreps(1)[1].ir
    ours = symmetric_basis(irreps, ir, order)
    couplings = np.zeros((ir.dim, *([irreps.dim] * order), len(ours)))
    for column, monomial in enumerate(monomials(irreps.dim, order)):
        couplings[(slice(None), *monomial)] = ours[:, :, column].T
    change = change_of_basis(couplings, irreps, ir, order)
    np.testing.assert_allclose(change, np.eye(len(ours)), atol=1e-12)


def test_opening_a_checkpoint_asks_for_consent_and_says_why(tmp_path):
    (tmp_path / "a.model").write_bytes(b"")
    with pytest.raises(ValueError, match="runs whatever code its author put in.*--trust"):
        to.convert_mace_torch(tmp_path / "a.model")
    with pytest.raises(ValueError, match="is not a file; expected a model of mace-torch"):
        to.convert_mace_torch(tmp_path / "b.model", trust=True)
    with pytest.raises(ValueError, match="could not be started"):
        to.convert_mace_torch(tmp_path / "a.model", trust=True, python=tmp_path / "no-python")


def test_without_mace_torch_the_way_out_is_named(tmp_path, monkeypatch):
    """An interpreter that has neither torch nor anything else."""
    (tmp_path / "a.model").write_bytes(b"")
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match="give one that has mace-torch .--python"):
        to.convert_mace_torch(tmp_path / "a.model", trust=True)
