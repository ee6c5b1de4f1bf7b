"""From a checkpoint of TDN, or a dump of one, to a potential on disk, as the command line does."""

import json
import sys
from pathlib import Path

import ase
import numpy as np
import pytest

from equizoo.cli import main
from equizoo.eval.convert_tdn import convert_tdn, dump_tdn, run_of
from equizoo.eval.potential import load
from equizoo.zoo._convert.tdn import Run
from equizoo.zoo._convert.tdn_dump import contents, write
from equizoo.zoo.tdn import Output

sys.path.append(str(Path(__file__).parents[1] / "zoo"))
from tdn_oracle import random_factors, random_state

WATER = ase.Atoms("OHH", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
HARTREE = 27.2114


def checkpoint():
    state = random_state(1, channels=4, num_layers=1, num_heads=2, num_basis=3, rows=80)
    return {"model_state_dict": state, "epoch": 3, "optimizer_state_dict": {}}


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "dump"
    write(*contents(checkpoint(), random_factors(1, 7)), str(folder))
    return folder


def test_the_command(dump, tmp_path):
    out, facts, energies = (tmp_path / name for name in ("model", "facts.json", "atoms.json"))
    energies.write_text('{"H": -13.5, "O": -2041.8}')
    main(
        ["convert", "tdn", str(dump), "--out", str(out), "--references", str(energies)]
        + ["--energies", "total", "--cutoff", "3.0", "--json", str(facts)]
    )
    described = json.loads(facts.read_text())
    assert described["elements"] == ["H", "O"] and described["energy_reference"] == "total"
    assert not described["conservative"] and not described["smooth"]
    potential = load(out)  # reproduces the stored outputs
    result = potential.predict(WATER, dtype="float64")
    assert np.abs(result.forces).max() > 1e-3
    run = Run(cutoff=3.0, output=Output.TOTAL, reference_energies={1: -13.5, 8: -2041.8})
    same = convert_tdn(dump, run).predict(WATER, dtype="float64")
    np.testing.assert_allclose(result.energy, same.energy, rtol=1e-12)
    np.testing.assert_allclose(result.forces, same.forces, atol=1e-12)
    per_atom = convert_tdn(dump, run._replace(output=Output.PER_ATOM))
    references = -2041.8 - 2 * 13.5
    found = per_atom.predict(WATER, dtype="float64").energy
    np.testing.assert_allclose(found - references, 3 * (same.energy - references))


def test_defaults_are_those_of_pubchemqcr(dump):
    potential = convert_tdn(dump)
    config = potential.config
    assert (config.cutoff, config.avg_num_nodes, config.output) == (4.5, 36.6, Output.PER_ATOM)
    assert len(config.atomic_numbers) == 25 and config.atomic_numbers[-1] == 35
    assert potential.reference_energies[1] == pytest.approx(-0.5002727762 * HARTREE)
    assert config.defect > 0.1  # random factors


def test_the_file_is_opened_elsewhere(dump, tmp_path):
    """Options reach the program; here a stand-in for the Python with torch."""
    python, file, factors = (tmp_path / name for name in ("python", "tdn.pth", "cp_init.pt"))
    python.write_text(f'#!/bin/sh\nshift 2; echo "$@" > {tmp_path}/said; cp -r {dump} "$1"\n')
    python.chmod(0o755)
    file.write_bytes(b"a checkpoint")
    factors.write_bytes(b"factors")
    out = tmp_path / "dumped"
    main(
        ["convert", "tdn", str(file), "--out", str(out), "--dump-only", "--raw"]
        + ["--factors", str(factors), "--python", str(python)]
    )
    assert (tmp_path / "said").read_text().split() == [str(out), "--raw", "--factors", str(factors)]
    assert convert_tdn(out).config == convert_tdn(dump).config


def test_what_cannot_be_converted(dump, tmp_path):
    file = tmp_path / "tdn.pth"
    with pytest.raises(ValueError, match=r"expected a checkpoint of TDN \(.pth\)"):
        dump_tdn(file, tmp_path / "out")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="could not be opened"):
        dump_tdn(file, tmp_path / "out")
    with pytest.raises(ValueError, match="lacks tdn.json"):
        convert_tdn(tmp_path)
    (tmp_path / "dump").mkdir()
    for name in ("tdn.json", "tdn.safetensors"):
        (tmp_path / "dump" / name).write_bytes((dump / name).read_bytes())
    (tmp_path / "dump" / "tdn.json").write_text('{"format": "equizoo-tdn-dump", "version": 0}')
    with pytest.raises(ValueError, match="of this version"):
        convert_tdn(tmp_path / "dump")


@pytest.mark.parametrize("text", ['{"Xx": 1.0}', '{"H": "low"}', '{"H": true}'])
def test_reference_energies_that_are_none(text, tmp_path):
    path = tmp_path / "atoms.json"
    options = dict(cutoff=4.5, avg_num_nodes=1.0, avg_num_neighbors=1.0)
    options |= dict(energies="total", forces="direct")
    with pytest.raises(ValueError, match="is not a file"):
        run_of(**options, references=path)
    path.write_text(text)
    with pytest.raises(ValueError, match="expected chemical symbols, each with an energy"):
        run_of(**options, references=path)
