"""Leaderboard files: the same bytes however a run went, refused where the server would."""

import dataclasses
import json
import shutil
import zlib

import lmdb
import numpy as np
import pytest
from models import ENERGIES, cluster, pair_potential

from equizoo.eval.leaderboard_file import check_file, score_file, write_file
from equizoo.eval.leaderboard_parts import SinglePoint, plan_parts, predict_parts
from equizoo.eval.leaderboard_relax import ByRelaxation
from equizoo.eval.leaderboard_tasks import TASKS, Layout, find_task, open_splits, read_counts
from equizoo.eval.open_catalyst import IS2RSMetrics, S2EFMetrics
from equizoo.eval.optimizers import LBFGS
from equizoo.eval.relax import Relaxer
from equizoo.structure import EnergyReference

TOTAL, ADSORPTION = EnergyReference.TOTAL, EnergyReference.ADSORPTION
S2EF, IS2RE, IS2RS = (TASKS[f"oc20-{kind}"] for kind in ("s2ef", "is2re", "is2rs"))
COUNTS = {"id": 5, "ood_ads": 2, "ood_cat": 3, "ood_both": 4}


def array(values, dtype: str) -> dict:
    values = np.asarray(values)
    return {"__ndarray__": [list(values.shape), dtype, values.ravel().tolist()]}


def save_split(folder, count: int, seed: int, s2ef: bool = True) -> None:
    """Random clusters with labels, the first atom fixed; ids whose order as text is another."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    environment = lmdb.open(str(folder / "a.aselmdb"), subdir=False, lock=False, map_size=1 << 24)
    with environment, environment.begin(write=True) as rows:
        for i in range(count):
            atoms = cluster(rng, int(rng.integers(2, 7)))
            data = {"sid": f"random{9 + i}", "y_relaxed": -1.0 - i}
            data["pos_relaxed"] = array(atoms.positions + 5.1, "float64")
            row = {
                "numbers": array(atoms.numbers, "int64"),
                "positions": array(atoms.positions + 5, "float64"),
                "cell": array(np.eye(3) * 12.0, "float64"),
                "pbc": array([True] * 3, "bool"),
                "energy": float(rng.normal()),
                "forces": array(rng.normal(size=(len(atoms), 3)), "float64"),
                "constraints": [{"name": "FixAtoms", "kwargs": {"indices": [0]}}],
                "data": data | ({"fid": 3} if s2ef else {}),
            }
            rows.put(str(i + 1).encode(), zlib.compress(json.dumps(row).encode()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for seed, (split, count) in enumerate(COUNTS.items()):
        save_split(folder / "s2ef" / f"test_{split}", count, seed)
        save_split(folder / "is2re" / split, count, seed, s2ef=False)
    return folder


@pytest.fixture(scope="module")
def potential():
    model = pair_potential().model
    fields = dict(energy_reference=ADSORPTION, level_of_theory="none", name="pair")
    return type(pair_potential())(model, reference_energies=dict.fromkeys(ENERGIES, -0.5), **fields)


def run(potential, data, folder, task=S2EF, **options):
    name = task.name.partition("-")[2]
    sources = open_splits(task, data / name, "test", COUNTS, ADSORPTION)
    predictor = SinglePoint(potential, forces=task is S2EF, batch_nodes=32)
    options = {"part_size": 2} | options
    missing = predict_parts(task, predictor, sources, folder, **options)
    return sources, plan_parts(sources, folder, options["part_size"]), missing


@pytest.fixture(scope="module")
def whole(potential, data, tmp_path_factory):
    """A run that nothing happened to, in both layouts."""
    folder = tmp_path_factory.mktemp("whole")
    _, parts, missing = run(potential, data, folder / "parts")
    assert missing == [] and len(parts) == 3 + 1 + 2 + 2
    for layout in Layout:
        write_file(folder / f"{layout}.npz", S2EF, layout, parts)
    return folder


class Killed(Exception):
    pass


def test_a_run_that_was_killed_ends_with_the_same_bytes(potential, data, whole, tmp_path):
    done = []

    def kill(systems):
        done.append(systems)
        if len(done) == 5:
            raise Killed

    with pytest.raises(Killed):
        run(potential, data, tmp_path / "parts", advance=kill)
    (tmp_path / "parts" / "id" / ".000000000-000000002.npz.0.partial").write_bytes(b"cut")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("0*.npz")}
    assert 0 < len(before) < 8
    _, parts, missing = run(potential, data, tmp_path / "parts")
    assert missing == []
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    write_file(tmp_path / "a.npz", S2EF, Layout.SPACE, parts)
    assert (tmp_path / "a.npz").read_bytes() == (whole / "space.npz").read_bytes()


def test_two_processes_share_the_work(potential, data, whole, tmp_path):
    _, parts, missing = run(potential, data, tmp_path / "parts", share=(1, 2))
    assert len(missing) == 4
    with pytest.raises(ValueError, match="4 of 8 parts are missing"):
        write_file(tmp_path / "a.npz", S2EF, Layout.SPACE, parts)
    _, parts, missing = run(potential, data, tmp_path / "parts", share=(0, 2))
    assert missing == []
    write_file(tmp_path / "a.npz", S2EF, Layout.EVALAI, parts)
    assert (tmp_path / "a.npz").read_bytes() == (whole / "evalai.npz").read_bytes()
    with pytest.raises(ValueError, match="share is 2 of 2"):
        run(potential, data, tmp_path / "parts", share=(2, 2))


def test_layouts(potential, data, whole):
    sources = open_splits(S2EF, data / "s2ef", "test", COUNTS, ADSORPTION)
    for layout in Layout:
        checked = check_file(whole / f"{layout}.npz", counts=COUNTS)
        assert (checked.task, checked.systems) == (S2EF, COUNTS)
        assert set(checked.dtypes.values()) == {"float32"}
        with np.load(whole / f"{layout}.npz", allow_pickle=False) as arrays:
            for split, source in sources.items():
                ids, energy, forces, ends = (arrays[name] for name in S2EF.arrays(split))
                frames = {frame.id: frame for frame in source}
                assert list(ids) == (sorted(frames) if layout == "evalai" else list(frames))
                chunks = np.split(forces, ends)
                for name, value, rows in zip(ids, energy, chunks, strict=True):
                    frame = frames[str(name)]
                    result = potential.predict(frame.structure)
                    kept = frame.free if layout is Layout.EVALAI else slice(None)
                    np.testing.assert_allclose(value, result.energy, atol=1e-6)
                    np.testing.assert_allclose(rows, result.forces[kept], atol=1e-6)
    assert list(frames) != sorted(frames)  # of the last split: the two orders differ


def test_scores_from_a_file_are_those_of_its_predictions(potential, data, whole):
    sources = open_splits(S2EF, data / "s2ef", "test", COUNTS, ADSORPTION)
    expected = S2EFMetrics(ADSORPTION)
    for frame in sources["id"]:
        result = potential.predict(frame.structure)
        expected.add(frame, result.energy, result.forces)
    for layout in Layout:
        scores = score_file(whole / f"{layout}.npz", S2EF, layout, sources)
        assert scores.keys() == COUNTS.keys()
        assert scores["id"] == pytest.approx(expected.summary(), rel=1e-5)
    with pytest.raises(ValueError, match="Is its layout another"):
        score_file(whole / "space.npz", S2EF, Layout.EVALAI, sources)


def test_initial_structures(potential, data, tmp_path):
    sources, parts, _ = run(potential, data, tmp_path / "parts", IS2RE)
    write_file(tmp_path / "a.npz", IS2RE, Layout.SPACE, parts)
    checked = check_file(tmp_path / "a.npz", counts=COUNTS)
    assert (checked.task, checked.rows) == (IS2RE, {})
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == sorted(f"{s}_{f}" for s in COUNTS for f in ("ids", "energy"))
        assert arrays["id_ids"].tolist() == ["9", "10", "11", "12", "13"]
    scores = score_file(tmp_path / "a.npz", IS2RE, Layout.SPACE, sources)
    first = next(iter(sources["ood_ads"]))
    errors = [
        abs(potential.predict(frame.structure).energy - frame.relaxed_energy)
        for frame in sources["ood_ads"]
    ]
    assert first.relaxed_energy == -1.0
    assert scores["ood_ads"]["energy_mae_meV"] == pytest.approx(1000 * np.mean(errors), rel=1e-5)
    with pytest.raises(ValueError, match="has no fid; expected frames of S2EF"):
        predict_parts(
            S2EF, SinglePoint(potential, forces=True), sources, tmp_path / "other", part_size=2
        )


def test_relaxations(potential, data, tmp_path):
    sources = open_splits(IS2RS, data / "is2re", "test", COUNTS, ADSORPTION)
    relaxer = Relaxer(potential, optimizer=LBFGS(3), fmax=0.01, max_steps=3, batch_nodes=32)
    whole = {}
    for task in (IS2RE, IS2RS):
        predictor = ByRelaxation(relaxer, positions=task is IS2RS)
        predict_parts(task, predictor, sources, tmp_path / task.name, part_size=4)
        whole[task.name] = tmp_path / f"{task.name}.npz"
        parts = plan_parts(sources, tmp_path / task.name, 4)
        write_file(whole[task.name], task, Layout.EVALAI, parts)
        assert check_file(whole[task.name], counts=COUNTS).task is task
        # what is computed again is the same, whatever was computed before
        parts[1].path.unlink()
        content = whole[task.name].read_bytes()
        predict_parts(task, predictor, sources, tmp_path / task.name, part_size=4)
        whole[task.name].unlink()
        write_file(whole[task.name], task, Layout.EVALAI, parts)
        assert whole[task.name].read_bytes() == content
    structures = {str(frame.sid): frame for frame in sources["id"]}
    with np.load(whole[IS2RE.name]) as energies, np.load(whole[IS2RS.name]) as positions:
        assert positions["id_ids"].tolist() == energies["id_ids"].tolist() == sorted(structures)
        chunks = np.split(positions["id_pos"], positions["id_chunk_idx"])
        for sid, energy, ended in zip(
            positions["id_ids"], energies["id_energy"], chunks, strict=True
        ):
            frame = structures[str(sid)]
            there = dataclasses.replace(frame.structure, positions=ended.astype(np.float64))
            assert potential.predict(there).energy == pytest.approx(float(energy), abs=1e-4)
            np.testing.assert_allclose(ended[0], frame.structure.positions[0], atol=1e-6)
    expected = IS2RSMetrics()
    for frame in sources["id"]:
        place = sorted(structures).index(str(frame.sid))
        expected.add(frame, chunks[place].astype(np.float64))
    scores = score_file(whole[IS2RS.name], IS2RS, Layout.EVALAI, sources)
    assert scores["id"] == pytest.approx(expected.summary())


def test_a_part_of_relaxations_is_about_ten_batches(potential, data, tmp_path):
    """So that many processes can share the work; single points have a thousand to a part."""
    sources = open_splits(IS2RE, data / "is2re", "test", COUNTS, ADSORPTION)
    sizes = {}
    for batch_nodes in (16, 512, 8192):
        relaxer = Relaxer(potential, max_steps=1, batch_nodes=batch_nodes)
        sizes[batch_nodes] = ByRelaxation(relaxer, positions=False).part_size
    assert sizes == {16: 2, 512: 64, 8192: 1024}
    assert SinglePoint(potential, forces=True).part_size == 1024
    relaxer = Relaxer(potential, max_steps=1, batch_nodes=16)
    missing = predict_parts(
        IS2RE, ByRelaxation(relaxer, positions=False), sources, tmp_path, share=(1, 2)
    )
    parts = plan_parts(sources, tmp_path, 2)
    assert missing == parts[0::2] and all(part.path.exists() for part in parts[1::2])


def test_energies_of_another_kind(data, tmp_path):
    total = pair_potential()
    with pytest.raises(ValueError, match="takes adsorption energies.*'total' and 'adsorption'"):
        run(total, data, tmp_path / "parts")
    references = {9 + i: 1.5 for i in range(5)}
    _, parts, _ = run(total, data, tmp_path / "parts", references=references)
    write_file(tmp_path / "a.npz", S2EF, Layout.SPACE, parts)
    sources = open_splits(S2EF, data / "s2ef", "test", COUNTS, ADSORPTION)
    frame = next(iter(sources["id"]))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        expected = total.predict(frame.structure).energy - 1.5
        np.testing.assert_allclose(arrays["id_energy"][0], expected, rtol=1e-6)


def test_parts_of_another_run_are_not_mixed_in(potential, data, tmp_path):
    run(potential, data, tmp_path / "parts", part_size=4)
    with pytest.raises(ValueError, match="parts of another run.*part_size: 4 there, 3 now"):
        run(potential, data, tmp_path / "parts", part_size=3)
    with pytest.raises(ValueError, match="part_size is 0"):
        run(potential, data, tmp_path / "more", part_size=0)


def test_data_that_are_not_all_there(data):
    with pytest.raises(ValueError, match="has 5 systems, expected 999736 for oc20-s2ef test id"):
        open_splits(S2EF, data / "s2ef", "test", S2EF.counts["test"])
    with pytest.raises(ValueError, match="no folder val_id or id"):
        open_splits(S2EF, data / "s2ef", "val", COUNTS)
    with pytest.raises(ValueError, match="Did you mean 'oc20-s2ef'"):
        find_task("oc20-s2fe")


def test_counts_of_another_arrangement(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(COUNTS))
    assert read_counts(tmp_path / "a.json", S2EF) == COUNTS
    for wrong in ({"id": 5}, COUNTS | {"id": 0}, [1]):
        (tmp_path / "a.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="expected a number of systems for each of id"):
            read_counts(tmp_path / "a.json", S2EF)


def test_official_counts():
    assert S2EF.counts["test"] == {
        "id": 999736, "ood_ads": 999859, "ood_cat": 999826, "ood_both": 999973,
    }  # fmt: skip
    assert TASKS["oc22-s2ef"].counts["test"] == {"id": 398377, "ood": 385438}


# ---- what a server would refuse


@pytest.fixture
def arrays(whole) -> dict:
    with np.load(whole / "space.npz", allow_pickle=False) as stored:
        return {name: stored[name] for name in stored}


def without(name):
    return lambda arrays: arrays.pop(name)


def with_(name, change):
    def altered(arrays):
        arrays[name] = change(arrays[name])

    return altered


def put(value, index=0):
    def altered(values):
        values = values.copy()
        values[index] = value
        return values

    return altered


def remove_split(arrays):
    for name in S2EF.arrays("ood_cat"):
        del arrays[name]


REFUSED = {
    "a missing split": (remove_split, "the split ood_cat is missing"),
    "a missing array": (without("id_chunk_idx"), "id_chunk_idx missing"),
    "a missing row": (with_("id_ids", lambda x: x[:-1]), "id_ids: 4 systems, expected 5"),
    "energies too few": (with_("id_energy", lambda x: x[:-1]), r"shape \(4,\), expected floats"),
    "energies of two axes": (with_("id_energy", lambda x: x[:, None]), r"shape \(5, 1\)"),
    "duplicates": (with_("id_ids", put("9_3", 1)), "1 ids come again, such as '9_3'"),
    "ids without fid": (with_("id_ids", put("77")), "1 ids such as '77', expected '1000100_50'"),
    "ids that are numbers": (with_("id_ids", lambda x: np.arange(5)), "expected text of one axis"),
    "objects": (
        with_("id_forces", lambda x: np.array([x[:2], x[2:5]], object)),
        "id_forces: an array of objects",
    ),
    "NaN": (with_("id_energy", put(np.nan)), "id_energy: 1 numbers are not finite"),
    "infinity": (with_("id_forces", put(np.inf)), "id_forces: 3 numbers are not finite"),
    "integers": (with_("id_energy", lambda x: x.astype(int)), "expected floats"),
    "vectors of two": (with_("id_forces", lambda x: x[:, :2]), r"expected floats of \(any, 3\)"),
    "the last end": (
        with_("id_chunk_idx", lambda x: np.append(x, x[-1] + 1)),
        "id_chunk_idx has 5 entries, expected 4",
    ),
    "ends that fall": (with_("id_chunk_idx", put(10**6)), "does not rise from above 0"),
    "a start instead": (with_("id_chunk_idx", put(0)), "system 0 would have rows 0 to 0"),
    "ends that are floats": (
        with_("id_chunk_idx", lambda x: x.astype(float)),
        "expected integers of one axis",
    ),
    "something else": (lambda arrays: arrays.update(extra=np.zeros(1)), "extra is no array of"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_server_would_refuse(kind, arrays, tmp_path):
    change, message = REFUSED[kind]
    change(arrays)
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"would be refused for oc20-s2ef:.*(?s:.*){message}"):
        check_file(tmp_path / "a.npz", S2EF, COUNTS)


def test_all_problems_are_listed(arrays, tmp_path):
    remove_split(arrays)
    arrays["id_energy"][:] = np.nan
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError) as error:
        check_file(tmp_path / "a.npz")
    for message in ("ood_cat is missing", "5 numbers are not finite", "expected 999736"):
        assert message in str(error.value)


def test_what_is_no_leaderboard_file(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no .npz file, or damaged"):
        check_file(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", positions=np.zeros(3))
    with pytest.raises(ValueError, match="say it with --task"):
        check_file(tmp_path / "b.npz")


def test_ids_that_come_twice_in_the_data(potential, data, tmp_path):
    sources, parts, _ = run(potential, data, tmp_path / "parts")
    twice = [*parts, dataclasses.replace(parts[0])]
    with pytest.raises(ValueError, match="id has the id .* twice"):
        write_file(tmp_path / "a.npz", S2EF, Layout.SPACE, twice)
    assert not (tmp_path / "a.npz").exists() and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "a.npz").write_text("")
    with pytest.raises(ValueError, match="Nothing is overwritten"):
        write_file(tmp_path / "a.npz", S2EF, Layout.SPACE, parts)
    assert len(list(sources["id"])) == 5


def test_parts_of_other_data_or_another_model_are_not_reused(potential, data, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    run(potential, own, tmp_path / "parts", share=(0, 2))
    energies = dict.fromkeys(ENERGIES, -0.25)
    other = potential.with_reference_energies(energies, potential.level_of_theory)
    with pytest.raises(ValueError, match="model_sha256"):
        run(other, own, tmp_path / "parts")
    file = own / "s2ef" / "test_id" / "a.aselmdb"
    file.unlink()
    save_split(own / "s2ef" / "again", COUNTS["id"], seed=9)
    (own / "s2ef" / "again" / "a.aselmdb").rename(file)
    with pytest.raises(ValueError, match="another run.*data: "):
        run(potential, own, tmp_path / "parts")


def test_each_leaderboard_has_the_layout_of_its_evaluator():
    layouts = {name: task.layout for name, task in TASKS.items()}
    assert {layouts[f"oc22-{kind}"] for kind in ("s2ef", "is2re", "is2rs")} == {Layout.EVALAI}
    assert {layouts["oc20-s2ef"], layouts["oc20-is2re"]} == {Layout.SPACE}
