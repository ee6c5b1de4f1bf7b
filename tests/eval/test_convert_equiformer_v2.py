"""From a dump of an EquiformerV2 checkpoint to a potential on disk, as the command line does it."""

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

import ase
import numpy as np
import pytest
import safetensors.numpy

from equizoo.cli import main
from equizoo.eval import checkpoints
from equizoo.eval.checkpoints import convert_released, ensure_converted
from equizoo.eval.convert_equiformer_v2 import convert_equiformer_v2, dump_equiformer_v2
from equizoo.eval.potential import load
from equizoo.registry import MODELS
from equizoo.structure import EnergyReference
from equizoo.zoo._convert.equiformer_v2_dump import ARRAYS, contents, write

sys.path.append(str(Path(__file__).parents[1] / "zoo"))
from equiformer_v2_oracle import random_state

SETTINGS = {
    "max_neighbors": 4,
    "max_radius": 3.0,
    "max_num_elements": 10,
    "num_layers": 1,
    "sphere_channels": 2,
    "attn_hidden_channels": 2,
    "num_heads": 1,
    "attn_alpha_channels": 2,
    "attn_value_channels": 2,
    "ffn_hidden_channels": 2,
    "norm_type": "rms_norm_sh",
    "lmax_list": [1],
    "mmax_list": [1],
    "grid_resolution": 4,
    "edge_channels": 2,
    "use_grid_mlp": True,
}
WATER = ase.Atoms("OHH", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]], cell=5 * np.eye(3), pbc=True)


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "dump"
    state = random_state(SETTINGS, num_basis=5)
    state["energy_lin_ref"] = np.linspace(-1, 0, 10)
    normalizers = {"energy": {"mean": 0.5, "std": 2.0}, "forces": {"mean": 0.0, "std": 1.5}}
    write(
        *contents({"state_dict": state, "config": {"model": SETTINGS}, "normalizers": normalizers}),
        str(folder),
    )
    return folder


def test_the_command(dump, tmp_path, capsys):
    out, facts = tmp_path / "model", tmp_path / "facts.json"
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "equiformer-v2", str(dump), "--out", str(out)])
    assert "--energy-reference" in capsys.readouterr().err and not out.exists()
    main(
        ["convert", "equiformer-v2", str(dump), "--out", str(out), "--elements", "H", "O"]
        + ["--energy-reference", "total", "--json", str(facts)]
    )
    described = json.loads(facts.read_text())
    assert described["elements"] == ["H", "O"] and described["energy_reference"] == "total"
    assert not described["conservative"] and not described["smooth"]
    potential = load(out)  # reproduces the stored outputs
    result = potential.predict(WATER, dtype="float64")
    assert result.stress is None and np.abs(result.forces).max() > 1e-3
    whole = convert_equiformer_v2(dump, energy_reference=EnergyReference.TOTAL)
    same = whole.predict(WATER, dtype="float64")
    np.testing.assert_allclose(result.energy, same.energy, rtol=1e-12)
    np.testing.assert_allclose(result.forces, same.forces, atol=1e-12)
    references = whole.reference_energies
    assert references[8] == pytest.approx(2.0 * (-1 + 8 / 9))
    atoms = WATER.copy()
    atoms.calc = whole.calculator("float64")
    np.testing.assert_allclose(atoms.get_forces(), same.forces, atol=1e-12)


def test_what_cannot_be_converted(dump, tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        dump_equiformer_v2(tmp_path / "nothing.pt", tmp_path / "out")
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        dump_equiformer_v2(file, dump)
    with pytest.raises(ValueError, match="could not be opened"):
        dump_equiformer_v2(file, tmp_path / "out")
    with pytest.raises(ValueError, match="could not be started"):
        dump_equiformer_v2(file, tmp_path / "out", python=tmp_path / "no-python")
    with pytest.raises(ValueError, match="lacks equiformer_v2"):
        convert_equiformer_v2(tmp_path, energy_reference=EnergyReference.TOTAL)
    with pytest.raises(ValueError, match="chemical symbols"):
        convert_equiformer_v2(dump, energy_reference=EnergyReference.TOTAL, elements=["Xx"])


def test_elements_that_a_linear_fit_lacked_are_left_out(dump, tmp_path):
    """Their references come out as up to 1e12 eV."""
    folder = tmp_path / "dump"
    shutil.copytree(dump, folder)
    arrays = safetensors.numpy.load_file(folder / ARRAYS)
    arrays["energy_lin_ref"] = np.where(np.arange(10) == 2, -3e9, arrays["energy_lin_ref"])
    safetensors.numpy.save_file(arrays, folder / ARRAYS)
    total = EnergyReference.TOTAL
    potential = convert_equiformer_v2(folder, energy_reference=total)
    assert potential.config.atomic_numbers == (1, 3, 4, 5, 6, 7, 8, 9)
    with pytest.raises(ValueError, match=r"no elements \[2\]"):
        convert_equiformer_v2(folder, energy_reference=total, elements=["He"])


def test_released_checkpoints_by_name(dump, tmp_path, monkeypatch):
    """From a folder of files fetched by hand, through a stand-in for the Python with torch."""
    mirror, python = tmp_path / "mirror", tmp_path / "python"
    entry = MODELS["equiformer-v2-oc22-121m"]
    mirror.mkdir()
    (mirror / entry.checkpoint.file).write_bytes(b"a checkpoint")
    python.write_text(f'#!/bin/sh\nmkdir -p "$3" && cp {dump}/* "$3"/\n')
    python.chmod(0o755)
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EQUIZOO_CHECKPOINTS", str(mirror))
    monkeypatch.setenv("EQUIZOO_TORCH_PYTHON", str(python))
    digest = hashlib.sha256(b"a checkpoint").hexdigest()
    wrong = dataclasses.replace(entry.checkpoint, sha256="0" * 64)
    with pytest.raises(ValueError, match=f"has SHA-256 {digest}, expected 0000"):
        ensure_converted(dataclasses.replace(entry, checkpoint=wrong))
    known = dataclasses.replace(entry.checkpoint, sha256=digest)
    with pytest.raises(ValueError, match=r"has cutoff 3.0 Å.* says 12.0 Å"):
        ensure_converted(dataclasses.replace(entry, checkpoint=known))
    with pytest.raises(ValueError, match="checkpoint of equiformer-v2, not of mace-torch"):
        convert_released(entry.name, "mace-torch")
    with pytest.raises(ValueError, match="needs --out"):
        convert_released(entry.name, "equiformer-v2", elements=["H"])
    with pytest.warns(UserWarning, match="no SHA-256; or it is another file"):
        potential = load(entry.name)
    assert potential.energy_reference == "total" and potential.name == entry.name
    assert entry.source == "cached" and potential.card.startswith("---")
    out = tmp_path / "cut"
    assert convert_released(entry.name, "equiformer-v2", out) == out
    with pytest.warns(UserWarning, match="no SHA-256; or it is another file"):
        kept = load(entry.name)  # it is not forgotten
    for again in (kept, load(out)):
        assert again.predict(WATER).energy == potential.predict(WATER).energy
    # a process that converts it meanwhile and is faster is no error
    folder = tmp_path / "cache" / "models" / entry.name
    done = folder.rename(tmp_path / "done")

    def slower(*_):
        done.rename(folder)
        return potential

    monkeypatch.setitem(checkpoints._CONVERTERS, "equiformer-v2", slower)
    with pytest.warns(UserWarning, match="it is another file"):
        assert ensure_converted(entry) == folder
