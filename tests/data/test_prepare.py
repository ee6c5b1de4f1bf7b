"""Prepared folders: the same frames, the same statistics, whole or not at all."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ase.db
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from test_records import assert_same_structure

from equizoo.data import prepare as prepare_module
from equizoo.data.datasets import load_dataset
from equizoo.data.prepare import prepare
from equizoo.data.prepared import (
    INDEX,
    Chained,
    PreparedStructures,
    Selected,
    open_prepared,
    with_stored_neighbors,
)
from equizoo.data.readers import LabelKeys, read_structures, write_structures
from equizoo.data.reference_energies import LeastSquares, fit_reference_energies
from equizoo.data.statistics import NeighborRule, Sizes, Statistics
from equizoo.graph import make_frame
from equizoo.neighbors import NeighborLimit
from equizoo.structure import Structure

E0 = {1: -13.5, 8: -2040.25}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_structures(count: int, seed: int = 0) -> list[Structure]:
    rng = np.random.default_rng(seed)
    structures = []
    for index in range(count):
        numbers = rng.choice([1, 8], int(rng.integers(2, 6)))
        periodic = index % 3 == 0
        structures.append(
            Structure(
                atomic_numbers=numbers.astype(np.int64),
                positions=rng.uniform(0, 3, (len(numbers), 3)),
                cell=np.eye(3) * 4.0 if periodic else np.zeros((3, 3)),
                pbc=(periodic,) * 3,
                energy=sum(E0[int(z)] for z in numbers) + rng.normal(0, 0.01),
                forces=rng.normal(size=(len(numbers), 3)) if index % 4 else None,
                stress=np.diag(rng.normal(size=3)) if periodic else None,
                info={"number": index},
            )
        )
    return structures


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "frames.xyz.xz"
    write_structures(path, make_structures(23))
    return path


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("prepared") / "frames"
    prepare([source], target, frames_per_shard=5, rule=NeighborRule(2.5), store_neighbors=True)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name, content in contents(folder).items():
        (to / name).write_bytes(content)
    return to


def test_frames_are_those_of_the_source_field_by_field(source, folder):
    read, prepared = load_dataset(source), load_dataset(folder)
    assert len(read) == len(prepared) == 23
    for a, b in zip(read.structures, prepared.structures, strict=True):
        assert_same_structure(a, b)
    assert prepared.energy_reference == read.energy_reference
    assert prepared.elements == read.elements
    assert prepared.report == read.report
    names = sorted(path.name for path in folder.iterdir())
    shards = [f"0000-{part:07d}.arrayrecord" for part in range(5)]
    assert names == [*shards, INDEX, "prepare.json"]


def test_statistics_are_those_of_a_pass_over_all_frames(source, folder):
    read, statistics = load_dataset(source), load_dataset(folder).statistics
    frames = [make_frame(s, 2.5, read.elements) for s in read.structures]
    assert statistics.sizes == Sizes.of(frames)
    components = np.concatenate([s.forces.ravel() for s in read.structures if s.forces is not None])
    assert statistics.forces_rms == pytest.approx(np.sqrt(np.mean(components**2)), rel=1e-14)
    assert statistics.labels == read.report.labels
    numbers = np.concatenate([s.atomic_numbers for s in read.structures])
    assert statistics.atoms == {"H": int((numbers == 1).sum()), "O": int((numbers == 8).sum())}
    fitted = LeastSquares().resolve(load_dataset(folder))
    exact = fit_reference_energies(read.structures)
    assert fitted == pytest.approx(exact, abs=1e-9)
    summary = json.loads((folder / INDEX).read_text())["summary"]
    assert summary["least_squares_E0_eV"] == pytest.approx({"H": exact[1], "O": exact[8]})
    assert summary["label_coverage"]["energy"] == 1.0


def test_reduced_least_squares_is_exact_and_knows_its_rank():
    """Against lstsq on all rows, over many small parts; and water alone, which has rank one."""
    from equizoo.data.reference_energies import fit_reduced
    from equizoo.data.statistics import Triangle

    structures = make_structures(300, seed=5)
    parts = [Triangle.of(structures[i : i + 7]) for i in range(0, 300, 7)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert fit_reduced(total) == pytest.approx(fit_reference_energies(structures), abs=1e-9)
    water = [
        dataclasses.replace(s, atomic_numbers=np.array([8, 1, 1]), forces=None)
        for s in make_structures(400, seed=6)
        if s.num_nodes == 3
    ]
    alone = Triangle.of(water[:9]) + Triangle.of(water[9:])
    with pytest.raises(ValueError, match="cannot tell apart .* of H, O.* have rank 1"):
        fit_reduced(alone)
    shortest = fit_reduced(alone, minimum_norm=True)
    assert shortest == pytest.approx(fit_reference_energies(water, minimum_norm=True), abs=1e-9)


def test_statistics_survive_json(folder):
    statistics = open_prepared(folder).statistics
    again = Statistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert again.sizes == statistics.sizes and again.rule == statistics.rule
    assert again.compositions.rows.tobytes() == statistics.compositions.rows.tobytes()
    limited = dataclasses.replace(statistics, rule=NeighborRule(3.0, NeighborLimit(4, 0.01)))
    assert Statistics.from_dict(limited.to_dict()).rule == limited.rule
    with pytest.raises(ValueError, match="expected one rule"):
        limited + statistics


def test_stored_neighbors_are_those_that_would_be_found(folder):
    structures = open_prepared(folder).structures
    for index in (0, 3, 22):
        structure, stored = with_stored_neighbors(structures, index, NeighborRule(2.5))
        found = make_frame(structure, 2.5, (1, 8)).neighbors
        for a, b in zip(stored, found, strict=True):
            np.testing.assert_array_equal(a, b)
        assert with_stored_neighbors(structures, index, NeighborRule(2.6))[1] is None
    part = Selected(Chained([structures, structures]), np.array([25, 1]))
    structure, stored = with_stored_neighbors(part, 0, NeighborRule(2.5))
    assert structure.name == structures[2].name and stored is not None


def test_frames_are_read_in_any_order_by_slices_processes_and_threads(folder):
    structures = open_prepared(folder).structures
    names = [s.name for s in structures]
    assert [s.name for s in structures[20:2:-7]] == names[20:2:-7]
    assert structures[-1].name == names[-1]
    with pytest.raises(IndexError):
        structures[23]
    assert [s.name for s in pickle.loads(pickle.dumps(structures))] == names
    seen: list[str] = []
    threads = [
        threading.Thread(target=lambda: seen.extend(s.name for s in structures)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted(4 * names)


def test_several_processes_write_the_same_bytes(source, folder, tmp_path):
    prepare(
        [source],
        tmp_path / "again",
        frames_per_shard=5,
        rule=NeighborRule(2.5),
        store_neighbors=True,
        workers=2,
    )
    assert contents(tmp_path / "again") == contents(folder)


KILLED = """
import sys, time
from equizoo.data import prepare as module
from equizoo.data.statistics import NeighborRule
make = module._make
def slow(*arguments):
    note = make(*arguments)
    print("part", flush=True)
    time.sleep(0.2)
    return note
write = module.encode
def slow_record(*arguments):
    time.sleep(0.02)
    return write(*arguments)
module._make, module.encode = slow, slow_record
module.prepare([sys.argv[1]], sys.argv[2], frames_per_shard=5, rule=NeighborRule(2.5),
               store_neighbors=True)
"""


@pytest.mark.parametrize("moment", [0.0, 0.25])
def test_kill_minus_9_then_the_same_command_gives_the_same_bytes(source, folder, tmp_path, moment):
    """Between two shards, and in the middle of one."""
    target = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source), str(target)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert [process.stdout.readline() for _ in range(2)] == ["part\n"] * 2
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = contents(target)
    assert INDEX not in left
    with pytest.raises(ValueError, match="not finished: run the same"):
        load_dataset(target)
    whole = {name: left[name] for name in left if name.startswith("0000-")}
    assert len(whole) >= 2
    assert whole.items() <= contents(folder).items()
    times = {name: (target / name).stat().st_mtime_ns for name in sorted(whole)[:2]}
    prepare([source], target, frames_per_shard=5, rule=NeighborRule(2.5), store_neighbors=True)
    assert contents(target) == contents(folder)
    assert times == {name: (target / name).stat().st_mtime_ns for name in times}  # kept


def test_a_stop_left_by_a_killed_run_stops_nobody(source, folder, tmp_path, monkeypatch):
    target = tmp_path / "target"
    options = dict(frames_per_shard=5, rule=NeighborRule(2.5), store_neighbors=True)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_work", lambda *_: None)
        patch.setattr(prepare_module, "_finish", lambda *_: None)
        with pytest.raises(ValueError, match="not finished"):
            prepare([source], target, **options)
    (target / prepare_module.NOTES).mkdir(exist_ok=True)
    (target / prepare_module.NOTES / prepare_module.STOP).touch()
    prepare([source], target, workers=2, **options)
    assert contents(target) == contents(folder)


def test_a_finished_folder_is_opened_and_other_settings_are_refused(source, folder, tmp_path):
    before = contents(folder)
    options = dict(frames_per_shard=5, rule=NeighborRule(2.5), store_neighbors=True)
    assert len(prepare([source], folder, **options)) == 23
    assert contents(folder) == before
    with pytest.raises(ValueError, match=r'(?s)other settings.*-.*"cutoff": 2.5.*\+.*3.0'):
        prepare([source], folder, **options | {"rule": NeighborRule(3.0)})
    with pytest.raises(ValueError, match="prepared already"):
        prepare([folder], tmp_path / "twice")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        prepare([source], tmp_path / "mine")


def test_a_source_that_has_changed_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.xyz"
    write_structures(path, make_structures(4))
    monkeypatch.setattr(prepare_module, "_finish", lambda *_: None)  # interrupted before the end
    with pytest.raises(ValueError, match="not finished"):
        prepare([path], tmp_path / "out")
    path.write_text(path.read_text() + path.read_text())
    with pytest.raises(ValueError, match="a source has changed since"):
        prepare([path], tmp_path / "out")


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_damaged_shards_are_refused_by_name(folder, tmp_path):
    damaged = copied(folder, tmp_path / "damaged")
    shard = damaged / "0000-0000002.arrayrecord"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"0000-0000002.arrayrecord has \d+ bytes, expected"):
        open_prepared(damaged)
    place = next(i for i in range(len(whole) // 3, len(whole)) if whole[i])
    shard.write_bytes(flip(whole, place))
    with pytest.raises(ValueError, match="0000-0000002.arrayrecord has SHA-256 .* altered"):
        open_prepared(damaged)
    shard.write_bytes(whole)
    assert len(open_prepared(damaged)) == 23
    shard.write_bytes(flip(whole, place))  # after it was found whole once
    with pytest.raises(ValueError, match="has SHA-256"):
        open_prepared(damaged)
    shard.unlink()
    with pytest.raises(ValueError, match="0000-0000002.arrayrecord is missing"):
        open_prepared(damaged)


def test_unverified_damage_is_found_when_read(folder, tmp_path):
    """Of the bytes that hold records none can change unseen."""
    damaged = copied(folder, tmp_path / "damaged")
    shard = damaged / "0000-0000000.arrayrecord"
    whole, shards = shard.read_bytes(), open_prepared(damaged).structures.shards
    used = [i for i in range(len(whole)) if whole[i]]
    found = 0
    for place in used[10 :: len(used) // 12]:
        shard.write_bytes(flip(whole, place))
        try:
            names = [s.name for s in PreparedStructures(damaged, shards)]
        except ValueError as error:
            found += 1
            assert "0000-0000000.arrayrecord" in str(error)
        else:
            assert names == [f"frames.xyz.xz[{i}]" for i in range(23)]
    assert found >= 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 of equizoo.prepared; this equizoo reads version 1. Upgrade"),
        ({"format": "other"}, "has the format 'other'"),
        ({"shards": []}, "its shards hold 0 frames, its statistics are of 23"),
        ({"statistics": {}}, "is damaged"),
        ({"shards": [{"file": "../a", "frames": 1, "num_bytes": 1, "sha256": ""}]}, "is missing"),
    ],
)
def test_other_versions_and_damaged_indices_are_refused(folder, tmp_path, change, message):
    other = copied(folder, tmp_path / "other")
    index = json.loads((other / INDEX).read_text()) | change
    (other / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_dataset(other)


def test_choices_made_when_preparing_cannot_be_made_again(folder):
    for options in (
        {"keys": LabelKeys()},
        {"isolated_atoms": {1: 0.0}},
    ):
        with pytest.raises(ValueError, match="give it to `equizoo prepare`"):
            load_dataset(folder, **options)
    with pytest.raises(ValueError, match="is '', not 'PBE'"):
        load_dataset(folder, level_of_theory="PBE")
    assert [s.info["number"] for s in load_dataset(folder, index="3:5").structures] == [3, 4]
    assert len(load_dataset(folder, index=-1)) == 1


def test_isolated_atoms_bad_frames_and_several_sources(tmp_path):
    structures = make_structures(6)
    isolated = dataclasses.replace(
        structures[0],
        atomic_numbers=np.array([1]),
        positions=np.zeros((1, 3)),
        forces=None,
        energy=E0[1],
        info={"config_type": "IsolatedAtom"},
    )
    write_structures(tmp_path / "a.xyz", [isolated, *structures[:4]])
    write_structures(tmp_path / "b.xyz", structures[4:])
    text = (tmp_path / "b.xyz").read_text().splitlines()
    spoiled = [line.replace("energy=", "energy=nan was=", 1) for line in text]
    (tmp_path / "b.xyz").write_text("\n".join([*text, *spoiled]) + "\n")
    sources = [tmp_path / "a.xyz", tmp_path / "b.xyz"]
    with pytest.raises(ValueError, match="energy holds NaN"):
        prepare(sources, tmp_path / "strict")
    dataset = prepare(sources, tmp_path / "out", frames_per_shard=1, on_bad="skip")
    assert [s.name for s in dataset.structures] == [f"a.xyz[{i}]" for i in range(1, 5)] + [
        "b.xyz[0]",
        "b.xyz[1]",
    ]
    assert dataset.isolated_atoms == {1: E0[1]}
    assert dataset.report.frames == 9 and dataset.report.kept == 6
    assert [left.count for left in dataset.report.left_out.values()] == [2]


def test_labels_under_another_name_stop_it_before_anything_is_written(tmp_path):
    write_structures(tmp_path / "a.xyz", make_structures(3), LabelKeys(energy="dft_energy"))
    with pytest.raises(ValueError, match="dft_energy"):
        prepare([tmp_path / "a.xyz"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ase_database(tmp_path):
    rng = np.random.default_rng(1)
    with ase.db.connect(tmp_path / "a.db", serial=True) as rows:
        for index in range(7):
            atoms = Atoms("OH", rng.normal(size=(2, 3)))
            forces = rng.normal(size=(2, 3))
            atoms.calc = SinglePointCalculator(atoms, energy=float(index), forces=forces)
            rows.write(atoms, campaign="x", data={"spectrum": np.arange(3.0)})
    read = read_structures(tmp_path / "a.db")
    prepared = prepare([tmp_path / "a.db"], tmp_path / "out", frames_per_shard=3)
    assert [s.energy for s in prepared.structures] == list(range(7))
    for a, b in zip(read.structures, prepared.structures, strict=True):
        assert_same_structure(a, b)


def test_only_one_at_a_time(source, folder):
    with (
        prepare_module._alone(folder),
        pytest.raises(ValueError, match="Another process prepares"),
        prepare_module._alone(folder),
    ):
        pass


def test_memory_does_not_grow_with_the_frames(tmp_path):
    """What is held while counting: nothing of the frames but a few hundred compositions."""
    from equizoo.data.statistics import Counting

    counting = Counting(NeighborRule(2.5))
    for structure in make_structures(600):
        counting.add(make_frame(structure, 2.5, (1, 8)))
        assert len(counting._held) < 256 and len(counting._triangle.rows) <= 3
    assert counting.result().sizes.frames == 600
    assert counting.result().labels["energy"] == 600
