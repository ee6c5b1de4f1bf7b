"""Named data sets: found, verified, honest about what they are; never silently another file."""

import dataclasses
import hashlib
import io
import lzma
import os
import urllib.error
from pathlib import Path

import ase.io
import numpy as np
import pytest

from equizoo.data import DATASETS, LabelKeys, datasets, list_datasets, load_dataset
from equizoo.data.catalyst_frames import Target
from equizoo.data.datasets import content_sha256, find_file
from equizoo.data.frames import OPENERS
from equizoo.data.readers import join
from equizoo.structure import EnergyReference

DATA = [Path(folder) for folder in os.environ.get("EQUIZOO_DATA", "").split(os.pathsep) if folder]
needs_data = pytest.mark.skipif(not DATA, reason="needs the data sets in EQUIZOO_DATA")
EXTERNAL = [name for name, source in DATASETS.items() if not source.bundled]
AS_TEXT = [name for name in EXTERNAL if DATASETS[name].file.endswith("xyz")]
TEXT = b"2\nenergy=-1.5\nH 0 0 0\nH 0 0 0.74\n"
SOURCE = dataclasses.replace(
    DATASETS["3bpa/train_300K"],
    name="toy/train",
    file="toy/train.xyz",
    sha256=hashlib.sha256(TEXT).hexdigest(),
    num_bytes=len(TEXT),
    url="https://example.org/train.xyz",
    require=("energy",),
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A registered set in no folder yet, with an empty EQUIZOO_DATA and cache."""
    monkeypatch.setattr(datasets, "DATASETS", {SOURCE.name: SOURCE})
    monkeypatch.setenv("EQUIZOO_DATA", f"{tmp_path / 'one'}{os.pathsep}{tmp_path / 'two'}")
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "urlopen", lambda *_, **__: pytest.fail("went to the network"))
    return SOURCE


def put(folder: Path, source, content: bytes, suffix: str = "") -> Path:
    path = folder / f"{source.file}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class Response(io.BytesIO):
    def __init__(self, content: bytes, url: str = "https://example.org/train.xyz"):
        super().__init__(content)
        self.geturl = lambda: url


def test_every_source_is_complete():
    for name, source in DATASETS.items():
        assert source.name == name
        assert source.licence, name
        assert source.citation, name
        assert source.level_of_theory, name
        assert source.page, name
        if not source.bundled:
            assert len(source.sha256) == 64, name
            assert source.num_bytes > 0, name
        assert source.url is None or source.url.startswith("https://"), name
    assert len({source.sha256 for source in DATASETS.values()}) == len(EXTERNAL) + 1
    assert {name.split("/")[0] for name in EXTERNAL} == {
        *("3bpa", "acac", "ethanol_extrap", "rmd17", "mlearn", "monbtaw", "water_deepmd"),
        *("phonon_rd", "oc20_relax", "oc22_sample"),
    }


def test_weights_of_three_sets_may_not_be_published():
    closed = {name.split("/")[0] for name, s in DATASETS.items() if not s.weights_releasable}
    assert closed == {"oc20_relax", "oc22_sample", "water_deepmd"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_bundled_set_needs_nothing(monkeypatch, tmp_path, split):
    monkeypatch.delenv("EQUIZOO_DATA", raising=False)
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path))
    dataset = load_dataset(f"formamide/{split}")
    assert dataset.report.kept == len(dataset) > 100
    assert dataset.report.labels["forces"] == len(dataset)
    assert dataset.energy_reference is EnergyReference.TOTAL
    assert dataset.level_of_theory == "PBE/def2-SVP"
    assert set(dataset.isolated_atoms) == {1, 6, 7, 8}
    assert dataset.elements == (1, 6, 7, 8)


def test_a_pattern_is_all_sets_of_one_level_of_theory():
    both = load_dataset("formamide/*")
    parts = [load_dataset(f"formamide/{split}") for split in ("train", "test")]
    assert both.name == "formamide/*" and len(both) == sum(map(len, parts))
    assert both.report.frames == sum(part.report.frames for part in parts)
    assert both.report.labels["forces"] == len(both)
    assert both.isolated_atoms == parts[0].isolated_atoms
    ends = both.structures[0], both.structures[-1]
    assert [s.energy for s in ends] == [
        parts[0].structures[0].energy,
        parts[1].structures[-1].energy,
    ]
    other = dataclasses.replace(parts[1], level_of_theory="PBE0", name="other")
    with pytest.raises(
        ValueError, match=r"'PBE/def2-SVP' \(formamide/train\) and 'PBE0' \(other\)"
    ):
        join([parts[0], other], "both")
    other = dataclasses.replace(parts[1], energy_reference=EnergyReference.FORMATION)
    with pytest.raises(ValueError, match="would mix two energy references"):
        join([parts[0], other], "both")
    other = dataclasses.replace(parts[1], isolated_atoms={1: -13.0})
    with pytest.raises(ValueError, match="has the isolated atom 1 at -13.0 eV"):
        join([parts[0], other], "both")
    with pytest.raises(ValueError, match="formamide/q"):
        load_dataset("formamide/q*")


def test_local_folders_come_first_and_compression_does_not_matter(toy, tmp_path):
    assert [row.where for row in list_datasets()] == ["download"]
    put(tmp_path / "cache" / "data", toy, TEXT)
    assert list_datasets("toy/*")[0].where == "cached"
    packed = put(tmp_path / "two", toy, lzma.compress(TEXT), ".xz")
    assert list_datasets()[0].where == "local"
    assert find_file(toy) == packed
    assert load_dataset("toy/train").structures[0].energy == -1.5
    assert find_file(toy) == packed
    assert find_file(toy) != put(tmp_path / "one", toy, TEXT) == find_file(toy)


@pytest.mark.parametrize("suffix", list(OPENERS))
def test_the_digest_is_of_the_content_not_of_the_compression(tmp_path, suffix):
    with OPENERS[suffix](tmp_path / f"a.xyz{suffix}", "wb") as file:
        file.write(TEXT)
    assert content_sha256(tmp_path / f"a.xyz{suffix}") == hashlib.sha256(TEXT).hexdigest()


def test_other_content_is_refused(toy, tmp_path):
    path = put(tmp_path / "one", toy, TEXT.replace(b"0.74", b"0.75"))
    with pytest.raises(ValueError, match="train.xyz is not toy/train: .* expected .* delete it"):
        load_dataset("toy/train")
    path.write_bytes(lzma.compress(TEXT)[:-9])
    with pytest.raises(ValueError, match="SHA-256"):
        load_dataset("toy/train")
    path.rename(f"{path}.xz")
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_dataset("toy/train")


def test_a_download_is_verified_and_kept(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "urlopen", lambda *_, **__: Response(TEXT))
    assert load_dataset("toy/train").structures[0].energy == -1.5
    monkeypatch.setattr(datasets, "urlopen", lambda *_, **__: pytest.fail("fetched twice"))
    assert find_file(toy) == tmp_path / "cache" / "data" / "toy" / "train.xyz"
    assert load_dataset("toy/train").report.kept == 1


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (Response(TEXT + b"more"), ValueError, "got 34 bytes .* the public file has changed"),
        (Response(TEXT[:-1]), ValueError, "got 32 bytes"),
        (Response(b"<html>"), ValueError, "is not toy/train"),
        (Response(TEXT, "http://example.org"), ConnectionError, "redirected to http://"),
        (urllib.error.URLError("offline"), ConnectionError, "https://example.org.*EQUIZOO_DATA"),
        (TimeoutError("slow"), ConnectionError, "slow"),
    ],
)
def test_a_failed_download_leaves_nothing(toy, tmp_path, monkeypatch, response, error, message):
    def urlopen(*_, **__):
        if isinstance(response, Exception):
            raise response
        return response

    monkeypatch.setattr(datasets, "urlopen", urlopen)
    with pytest.raises(error, match=message):
        load_dataset("toy/train")
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_a_set_without_address_says_how_to_get_it(toy, monkeypatch):
    monkeypatch.setattr(
        datasets, "DATASETS", {"toy/train": dataclasses.replace(toy, url=None, page="the page")}
    )
    with pytest.raises(ValueError, match=r"Original: the page .*toy/train.xyz .*EQUIZOO_DATA"):
        load_dataset("toy/train")
    with pytest.raises(ValueError, match="is not an https address"):
        find_file(dataclasses.replace(toy, url="http://example.org/train.xyz"))


def test_unknown_names_are_corrected():
    with pytest.raises(ValueError, match="Did you mean '3bpa/train_300K'"):
        load_dataset("3bpa/train300K")


def test_a_path_is_read_with_what_the_caller_says(tmp_path):
    (tmp_path / "a.xyz").write_bytes(TEXT.replace(b"energy", b"E_dft"))
    dataset = load_dataset(
        tmp_path / "a.xyz",
        LabelKeys("E_dft"),
        energy_reference=EnergyReference.ADSORPTION,
        level_of_theory="RPBE",
    )
    assert (dataset.energy_reference, dataset.level_of_theory) == ("adsorption", "RPBE")
    assert dataset.structures[0].energy == -1.5
    with pytest.raises(ValueError, match="energy='E_dft'"):
        load_dataset(tmp_path / "a.xyz")


def test_what_a_registered_set_is_cannot_be_contradicted():
    with pytest.raises(ValueError, match="two energy references, 'adsorption' and 'total'"):
        load_dataset("formamide/test", energy_reference=EnergyReference.ADSORPTION)
    with pytest.raises(ValueError, match="is 'PBE/def2-SVP', not 'PBE0'"):
        load_dataset("formamide/test", level_of_theory="PBE0")


# The real files


@needs_data
@pytest.mark.parametrize("name", EXTERNAL)
def test_the_registered_file_is_the_one_in_the_data_folder(name):
    path = find_file(DATASETS[name])
    assert any(path.is_relative_to(folder) for folder in DATA)


@needs_data
@pytest.mark.parametrize(
    ("name", "index"),
    [(name, "::97" if "oc20" not in name else ":2") for name in AS_TEXT],
)
def test_every_number_is_the_one_in_the_file(name, index):
    """Against a plain parse of the same frames by ASE."""
    dataset = load_dataset(name, index=index)
    with (
        lzma.open(path)
        if (path := find_file(DATASETS[name])).suffix == ".xz"
        else path.open("rb") as file
    ):
        frames = ase.io.read(io.StringIO(file.read().decode()), index, format="extxyz")
    for structure, atoms in zip(dataset.structures, frames, strict=True):
        results = {} if atoms.calc is None else atoms.calc.results
        np.testing.assert_array_equal(structure.atomic_numbers, atoms.numbers)
        np.testing.assert_array_equal(structure.positions, atoms.positions)
        np.testing.assert_array_equal(structure.cell, atoms.cell.array)
        assert structure.pbc == tuple(atoms.pbc)
        assert structure.energy == results.get("energy")
        assert (structure.forces is None) == ("forces" not in results)
        if structure.forces is not None:
            np.testing.assert_array_equal(structure.forces, results["forces"])
        assert (structure.stress is None) == ("stress" not in results)
        if structure.stress is not None:
            voigt = structure.stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
            np.testing.assert_allclose(voigt, results["stress"], atol=1e-12)


@needs_data
@pytest.mark.parametrize("name", ["3bpa/train_300K", "rmd17/ethanol_train_01", "mlearn/Si_test"])
def test_counts_and_isolated_atoms(name):
    dataset = load_dataset(name)
    assert len(dataset) == {"3": 500, "r": 1000, "m": 25}[name[0]]
    assert dataset.report.left_out == {}
    assert dataset.report.unread == {}
    assert bool(dataset.isolated_atoms) == (name[0] != "m")


@needs_data
def test_isolated_atoms_are_those_of_the_files():
    files = {"3bpa/train_300K": "3bpa/iso_atoms.xyz", "acac/train_300K": "acac/isolated_atoms.xyz"}
    files["ethanol_extrap/train"] = "ethanol_extrap/isolated_atoms.xyz"
    for name, file in files.items():
        path = next(folder / file for folder in DATA if (folder / file).exists())
        assert DATASETS[name].isolated_atoms == datasets.read_isolated_atoms(path)


@needs_data
def test_fixed_atoms_of_a_slab_keep_their_forces():
    structure = load_dataset("oc20_relax/s2ef_val", index=0).structures[0]
    assert structure.info["fixed"].any()
    assert np.abs(structure.forces[structure.info["fixed"]]).max() > 0.01
    assert structure.info["tags"].max() == 2


@needs_data
def test_initial_structures_are_labelled_by_relaxed_energies():
    dataset = load_dataset("oc20_relax/is2re_train")
    assert len(dataset) == 23 and dataset.report.labels == {"energy": 23, "forces": 0, "stress": 0}
    assert dataset.energy_reference == EnergyReference.TOTAL
    frame = load_dataset("oc20_relax/is2re_train", target=Target.FRAME).structures[0]
    relaxed = dataset.structures[0]
    np.testing.assert_array_equal(frame.positions, relaxed.positions)
    assert relaxed.info["sid"] == 1000100 and relaxed.info["fixed"].sum() == 17
    assert (frame.energy, relaxed.energy) == (-57.74908337, -60.58567902)  # systems.csv


@needs_data
def test_folders_of_oc20_are_data_sets():
    folder = next(f for f in DATA if (f / "oc20_relax").is_dir()) / "oc20_relax"
    dataset = load_dataset(folder / "aselmdb/val_20", data_energy_reference=EnergyReference.TOTAL)
    assert len(dataset) == 20 and dataset.report.labels["forces"] == 20
    assert dataset.energy_reference == EnergyReference.TOTAL
    with pytest.raises(ValueError, match="needs the energy of its clean surface"):
        load_dataset(folder / "s2ef_val", energy_reference=EnergyReference.ADSORPTION)
    with pytest.raises(ValueError, match="leave out keys, index"):
        load_dataset(folder / "aselmdb/val_20", index=":3")
