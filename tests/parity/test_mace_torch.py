"""Converted models against mace-torch itself, in float64: energies, forces and stresses."""

import os

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # which e3nn 0.4.4 asks for

import dataclasses
import json
import shutil

import numpy as np
import parity_table
import pytest

if not os.environ.get("EQUIZOO_PARITY"):  # which `make parity` sets: there it must not be missing
    REASON = "mace-torch is not installed here; 'make parity' makes an environment that has it"
    pytest.importorskip("torch", reason=REASON)
    pytest.importorskip("mace", reason=REASON)

import torch
import torch_models as peers
from e3nn import o3
from mace.modules.blocks import NonLinearBiasReadoutBlock

from equizoo.cli import main
from equizoo.eval import convert_mace_torch as to
from equizoo.eval.checkpoints import ensure_converted
from equizoo.eval.potential import load
from equizoo.hub import join_front_matter, sha256_of, split_front_matter
from equizoo.registry import MODELS, CardRegistry, Checkpoint
from equizoo.structure import Structure
from equizoo.zoo._convert.mace_torch import INTERACTIONS, read_dump
from equizoo.zoo._convert.mace_torch_dump import dump_model

ENERGY, FORCES = 1e-10, 1e-9  # relative, float64: the same sums in another order
SINGLE = 2e-5  # relative: constants of a float32 checkpoint are rounded, ours are not

CHARGED = {
    "total_charge": {"type": "categorical", "per": "graph", "num_classes": 11, "offset": 5,
                     "emb_dim": 4, "in_dim": 1},
    "total_spin": {"type": "continuous", "per": "graph", "in_dim": 1, "emb_dim": 3},
}  # fmt: skip
CASES = {
    "residual": {},
    "agnostic, no hidden vectors": {"first": "agnostic", "hidden": 0},
    "hidden and messages of higher degree": {"first": "agnostic", "hidden": 2, "channels": 2},
    "messages of degree 3": {"hidden": 0, "channels": 2, "max_ell": 3, "correlation": 2},
    "density, agnesi, repulsion": {
        "first": "density", "later": "density_residual", "distance_transform": "Agnesi",
        "pair_repulsion": True,
    },
    "density in the other order, soft, gaussian": {
        "first": "density_residual", "later": "density", "distance_transform": "Soft",
        "radial_type": "gaussian",
    },
    "attention": {"first": "attention", "later": "attention", "correlation": 2},
    "nonlinear": {
        "first": "nonlinear", "later": "nonlinear", "apply_cutoff": False, "correlation": 2,
        "readout_cls": NonLinearBiasReadoutBlock, "edge_irreps": o3.Irreps("3x0e+3x1o"),
    },
    "one layer": {"num_interactions": 1},
    "three layers": {"first": "agnostic", "num_interactions": 3, "correlation": 2, "channels": 2},
    "density with envelope on weights": {
        "first": "density", "later": "density_residual", "apply_cutoff": False, "max_ell": 1,
    },
    "four-fold products": {"correlation": 4, "max_ell": 1},
    "without scale and shift, tanh": {
        "scaled": False, "pair_repulsion": True, "gate": torch.tanh, "max_ell": 1,
    },
    "last readout alone, one product for all": {
        "use_last_readout_only": True, "use_agnostic_product": True, "max_ell": 1,
        "correlation": 2,
    },
    "last layer with vectors": {"keep_last_layer_irreps": True, "max_ell": 1, "correlation": 2},
    "reduced basis": {"use_reduced_cg": True},
}  # fmt: skip


def converted(model, folder, **options):
    dump_model(model, str(folder / "dump"))
    return to.convert_mace_torch(folder / "dump", **options)


def assert_equal(found, expected, energy=ENERGY, forces=FORCES):
    """Relative to the largest number of each kind."""
    assert_close("energy", found.energy, expected[0], energy)
    for quantity, ours, theirs in zip(
        ("forces", "stress"), (found.forces, found.stress), expected[1:], strict=True
    ):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert np.abs(theirs).max() > 1e-6
            assert_close(quantity, ours, theirs, forces)


def assert_close(quantity, ours, theirs, tolerance):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    parity_table.record(quantity, float(error))
    assert error <= tolerance, f"{quantity}: relative error {error:.1e}, allowed {tolerance:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_equal_to_mace_torch(name, tmp_path):
    """A cluster and a crystal in one batch."""
    if CASES[name].get("use_reduced_cg"):
        pytest.importorskip("cuequivariance_torch", reason="it has the reduced basis")
    model = peers.build(**CASES[name])
    structures = [peers.molecule(), peers.crystal()]
    potential = converted(model, tmp_path)
    for found, atoms in zip(
        potential.predict(structures, dtype="float64"), structures, strict=True
    ):
        assert_equal(found, peers.evaluate(model, atoms))


def test_chebyshev_energy(tmp_path):
    """Energies alone: torch gives these polynomials no derivative, so its forces lack a term."""
    model = peers.build(radial_type="chebyshev", distance_transform="Agnesi", max_ell=1)
    found = converted(model, tmp_path).predict(peers.molecule(), dtype="float64")
    assert_close("energy", found.energy, peers.evaluate(model, peers.molecule())[0], ENERGY)


def test_slab(tmp_path):
    model, slab = peers.build(max_ell=1, correlation=2), peers.crystal(pbc=(True, True, False))
    assert_equal(
        converted(model, tmp_path).predict(slab, dtype="float64"), peers.evaluate(model, slab)
    )


def test_heads(tmp_path):
    """Each head by itself, a batch of both, saved and read back, and cut down to one."""
    kinds = dict(max_ell=1, correlation=2, heads=("bulk", "molecules"))
    model, atoms = peers.build(**kinds), peers.molecule()
    expected = {head: peers.evaluate(model, atoms, head) for head in model.heads}
    assert abs(expected["bulk"][0] - expected["molecules"][0]) > 1e-3
    potential = converted(model, tmp_path)
    potential.with_head("molecules").save(tmp_path / "saved", golden=False)
    potential = load(tmp_path / "saved", check_golden=False)
    assert potential.head == "molecules"
    mixed = [
        dataclasses.replace(Structure.from_atoms(atoms), head=head)
        for head in ("bulk", None, "molecules")
    ]
    results = potential.predict(mixed, dtype="float64")
    for found, head in zip(results, ("bulk", "molecules", "molecules"), strict=True):
        assert_equal(found, expected[head])
    for head in model.heads:
        single = potential.with_head(head).only_head()
        assert single.config.heads == (head,)
        assert_equal(single.predict(atoms, dtype="float64"), expected[head])
    with pytest.raises(ValueError, match="expected one of bulk, molecules"):
        potential.predict(dataclasses.replace(mixed[0], head="surfaces"))


def test_charge_and_spin(tmp_path):
    model = peers.build(
        max_ell=1, correlation=2, heads=("a", "b"), embedding_specs=CHARGED,
        use_embedding_readout=True, readout_cls=NonLinearBiasReadoutBlock,
    )  # fmt: skip
    potential, atoms = converted(model, tmp_path), peers.molecule()
    energies = []
    for head, charge, spin in (("a", 0, 1), ("b", 0, 1), ("b", -2, 1), ("b", -2, 3)):
        atoms.info = {"charge": charge, "spin": spin, "head": head}
        expected = peers.evaluate(model, atoms, head, charge, spin)
        assert_equal(potential.predict(atoms, dtype="float64"), expected)
        energies.append(expected[0])
    assert len(set(np.round(energies, 6))) == 4
    single = potential.with_head("b").only_head()
    assert_equal(single.predict(atoms, dtype="float64"), expected)
    atoms.info["charge"] = 6
    with pytest.raises(ValueError, match="charge 6; the model knows whole numbers from -5 to 5"):
        potential.predict(atoms)


def test_single_precision_checkpoint(tmp_path):
    """Evaluated in float64 by both: weights are equal, constants but for their rounding."""
    model = peers.build(
        "density", "density_residual", dtype=torch.float32, distance_transform="Agnesi",
        pair_repulsion=True, hidden=0, channels=2, correlation=2,
    ).double()  # fmt: skip
    potential = converted(model, tmp_path)
    found = potential.predict(peers.crystal(), dtype="float64")
    assert_equal(found, peers.evaluate(model, peers.crystal()), SINGLE, SINGLE)
    assert potential.config.distance_transform.radii is not None  # as rounded in the file


def test_fewer_elements(tmp_path):
    """Cut to two of three: equal on what is left, for all tables there are."""
    for name in ("nonlinear", "density, agnesi, repulsion"):
        model = peers.build(**CASES[name] | {"max_ell": 1})
        (folder := tmp_path / name.split(",")[0]).mkdir()
        potential = converted(model, folder).with_elements(["O", "H"])
        assert potential.config.atomic_numbers == (1, 8)
        atoms = peers.molecule()
        atoms.numbers[atoms.numbers == 6] = 8
        assert_equal(potential.predict(atoms, dtype="float64"), peers.evaluate(model, atoms))
        with pytest.raises(ValueError, match="has element.* C "):
            potential.predict(peers.molecule())


def saved_model(folder, **fields):
    model = peers.build(**{"max_ell": 1, "correlation": 2, "channels": 2} | fields)
    torch.save(model, folder / "tiny.model")
    return model, folder / "tiny.model"


def test_command_line(tmp_path, capsys):
    """File to folder in one command and in two, the same bytes; then used by every other one."""
    model, file = saved_model(tmp_path)
    with pytest.raises(SystemExit):
        main(["convert", "mace-torch", str(file), "--out", str(tmp_path / "a")])
    assert "--trust" in capsys.readouterr().err and not (tmp_path / "a").exists()
    one = ["convert", "mace-torch", str(file), "--trust", "--out"]
    main([*one, str(tmp_path / "a"), "--level-of-theory", "PBE", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["elements"] == ["H", "C", "O"] and facts["level_of_theory"] == "PBE"
    main([*one, str(tmp_path / "dump"), "--dump-only"])
    main(["convert", "mace-torch", str(tmp_path / "dump"), "--out", str(tmp_path / "b")])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    potential = load(tmp_path / "a")  # which checks the golden outputs
    assert potential.source["file"] == "tiny.model" and len(potential.source["sha256"]) == 64
    assert_equal(
        potential.predict(peers.crystal(), dtype="float64"), peers.evaluate(model, peers.crystal())
    )


def test_released_checkpoint(tmp_path, monkeypatch):
    """By name: from a folder of files, checked, converted once, its terms agreed to."""
    (mirror := tmp_path / "mirror").mkdir()
    _, file = saved_model(mirror, heads=("x", "y"))
    digest = sha256_of(file)
    fields, body = split_front_matter(MODELS.text("mace-mp-0-small"))
    fields |= {
        "name": "tiny",
        "elements": ["H", "C", "O"],
        "cutoff": peers.CUTOFF,
        "license_weights": "ASL",
        "checkpoint": dataclasses.asdict(
            Checkpoint("mace-torch", file.name, "https://example.org/tiny.model", digest,
                       "For academic use.", "y")
        ),
    }  # fmt: skip
    (cards := tmp_path / "cards").mkdir()
    (cards / "tiny.md").write_text(join_front_matter(fields, body))
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EQUIZOO_CHECKPOINTS", str(mirror))
    for module in ("registry", "eval.checkpoints", "eval.potential"):
        monkeypatch.setattr(f"equizoo.{module}.MODELS", CardRegistry(cards))
    entry = CardRegistry(cards)["tiny"]
    monkeypatch.setattr("equizoo.eval.potential.find_model_folder", lambda spec, access: folder)
    folder = tmp_path / "cache" / "models" / "tiny"
    with pytest.raises(ValueError, match="For academic use.*accept_license='ASL'"):
        load("tiny", trust=True)
    with pytest.raises(ValueError, match="runs whatever code.*trust=True"):
        load("tiny", accept_license="ASL")
    wrong = dataclasses.replace(entry.checkpoint, sha256="0" * 64)
    with pytest.raises(ValueError, match=f"has SHA-256 {digest}, expected 0000"):
        ensure_converted(
            dataclasses.replace(entry, checkpoint=wrong), trust=True, accept_license="ASL"
        )
    with pytest.raises(ValueError, match="the card of tiny says 9.0 Å"):
        ensure_converted(dataclasses.replace(entry, cutoff=9.0), trust=True, accept_license="ASL")
    assert not folder.exists()
    first = load("tiny", trust=True, accept_license="ASL")
    assert first.head == "y" and first.source["sha256"] == digest
    assert first.card == (cards / "tiny.md").read_text()
    shutil.rmtree(mirror)
    again = load("tiny")
    assert again.predict(peers.molecule()).energy == first.predict(peers.molecule()).energy


def test_refusals(tmp_path):
    cases = {
        "use_so3": ({"use_so3": True, "max_ell": 1}, "even parity only"),
        "pseudo": ({"hidden_irreps": o3.Irreps("2x0e+2x1e"), "max_ell": 1}, "not C x"),
        "per atom": (
            {"max_ell": 1, "embedding_specs": {"total_charge": CHARGED["total_charge"] |
                                               {"per": "node"}}},
            "total_charge per node",
        ),
    }  # fmt: skip
    for name, (fields, message) in cases.items():
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=message):
            converted(peers.build(**{"correlation": 2, "channels": 2} | fields), tmp_path / name)
    (tmp_path / "not.model").write_text("nothing")
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    for name, message in (("not.model", "could not be opened"), ("checkpoint.pt", "a training")):
        with pytest.raises(ValueError, match=message):
            to.convert_mace_torch(tmp_path / name, trust=True)


def test_every_interaction_of_mace_torch_is_covered():
    cases = CASES.values()
    kinds = {case.get(key, "residual") for case in cases for key in ("first", "later")}
    assert {peers.BLOCKS[kind] for kind in kinds} == set(INTERACTIONS)


def test_dumps_hold_plain_data(tmp_path):
    model, file = saved_model(tmp_path)
    to.dump_mace_torch(file, tmp_path / "dump", trust=True)
    dump = read_dump(tmp_path / "dump")
    assert sorted(f.name for f in (tmp_path / "dump").iterdir()) == [
        "mace.json",
        "mace.safetensors",
    ]
    assert set(dump.arrays) <= set(model.state_dict())
