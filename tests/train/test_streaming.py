"""Training on data that stay on the disk: the same batches, the same weights, resumable."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import CUTOFF, SPECIES, make_structures, tiny_model
from test_recipe import MODEL, TRAINING

from equizoo.config import to_dict
from equizoo.data.datasets import load_dataset
from equizoo.data.pipeline import LazyFrames, Packing, Reading, Share, training_stream
from equizoo.data.prepare import prepare
from equizoo.data.prepared import Chained, PreparedStructures, Selected
from equizoo.data.readers import write_structures
from equizoo.data.reference_energies import LeastSquares
from equizoo.data.statistics import NeighborRule
from equizoo.graph import Budget, make_frame
from equizoo.train import recipe as recipe_module
from equizoo.train.progress import read_rows
from equizoo.train.recipe import DataConfig, Recipe, complete_config, prepare_data, train

RULE = NeighborRule(CUTOFF)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "morse.xyz"
    write_structures(path, make_structures(24))
    return path


@pytest.fixture(scope="module")
def folder(data_file, tmp_path_factory):
    target = tmp_path_factory.mktemp("prepared") / "morse"
    prepare([data_file], target, frames_per_shard=7, rule=RULE, store_neighbors=True)
    return target


@pytest.fixture(scope="module")
def lazy(folder):
    frames = recipe_module._frames(load_dataset(folder).structures, tiny_model().config)
    assert isinstance(frames, LazyFrames)
    return frames


@pytest.fixture(scope="module")
def packing(lazy):
    return Packing(Budget.of(list(lazy), nodes=14, graphs=6), np.zeros(len(SPECIES)))


def bytes_of(batch):
    return b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(batch))


def test_the_stream_is_that_of_frames_in_memory(lazy, packing):
    held, read = (training_stream(f, packing, seed=4) for f in (list(lazy), lazy))
    assert [bytes_of(next(held)) for _ in range(20)] == [bytes_of(next(read)) for _ in range(20)]
    read.close()


def test_another_number_of_threads_and_processes_goes_on_with_the_same_batches(lazy, packing):
    stream = training_stream(lazy, packing, seed=4, reading=Reading(threads=0))
    for _ in range(5):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [bytes_of(next(stream)) for _ in range(12)]
    for reading in (Reading(threads=3), Reading(workers=2)):
        other = training_stream(lazy, packing, seed=4, reading=reading)
        other.set_state(state)
        assert bytes_of(other.peek()) == expected[0]
        assert other.get_state() == state
        assert [bytes_of(next(other)) for _ in range(12)] == expected
        other.close()


def test_hosts_share_every_pass_without_overlap(lazy, packing):
    """Two hosts of one shuffle: each frame once in a pass, and another number is refused."""
    names = []
    for host in range(2):
        stream = training_stream(lazy, packing, seed=4, share=Share(host, 2))
        seen: list[str] = []
        while len(seen) < 24:
            seen += [frame.structure.name for frame in stream.take()]
        names.append(seen[:12])
        state = stream.get_state()
        with pytest.raises(
            ValueError, match=rf"was host {host} of 2, this is host 0 of 1.*2 hosts"
        ):
            training_stream(lazy, packing, seed=4).set_state(state)
        stream.close()
    assert sorted(names[0] + names[1]) == sorted(lazy[i].structure.name for i in range(24))


def test_other_data_and_old_checkpoints_are_refused(lazy, packing):
    state = training_stream(lazy, packing, seed=4).get_state()
    with pytest.raises(ValueError, match="had 24 frames to train on, now there are 20"):
        training_stream(lazy[:20], packing, seed=4).set_state(state)
    with pytest.raises(ValueError, match="an older version"):
        training_stream(lazy, packing, seed=4).set_state({"next_index": 3})


def test_a_frame_too_large_is_named_when_it_is_read(lazy, packing):
    tight = dataclasses.replace(packing.budget, nodes=4)
    stream = training_stream(lazy, Packing(tight, np.zeros(len(SPECIES))), seed=4)
    with pytest.raises(ValueError, match=r"morse.xyz\[\d+\] with \d+ atoms .* does not fit"):
        for _ in range(24):
            next(stream)


# ---- whole runs


def recipe_for(data) -> Recipe:
    config = DataConfig(train=str(data), num_valid=6, reference_energies=LeastSquares())
    training = dataclasses.replace(TRAINING, epochs=2)
    return Recipe(name="tiny", model=MODEL, data=config, training=training)


def test_a_run_on_the_disk_is_one_in_memory(data_file, folder, tmp_path):
    """Given one configuration, which the statistics of the whole folder would alter a little."""
    in_memory = prepare_data(recipe_for(data_file).data)
    config = complete_config(MODEL, in_memory)
    fixed = to_dict(config)
    rows = []
    for data in (data_file, folder):
        recipe = dataclasses.replace(recipe_for(data), model=fixed)
        assert train(recipe, tmp_path / data.name) is not None
        rows.append(read_rows(tmp_path / data.name / "metrics.jsonl"))
    assert len(rows[0]) == len(rows[1]) == 2
    for a, b in zip(*rows, strict=True):
        for key in ("train_loss", "valid_objective"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_statistics_come_from_the_folder_and_not_from_a_pass(folder, monkeypatch):
    data = prepare_data(recipe_for(folder).data)

    def gone_through(structures):
        raise AssertionError("all frames are read")

    for kind in (PreparedStructures, Selected, Chained):
        monkeypatch.setattr(kind, "__iter__", gone_through)
    statistics = load_dataset(folder).statistics
    assert data.elements == SPECIES
    config = complete_config(MODEL, data)
    assert config.avg_num_neighbors == statistics.sizes.mean_neighbors
    assert config.scale == statistics.forces_rms
    e0 = LeastSquares().resolve(recipe_module._joined(data))
    assert e0 == LeastSquares().resolve(load_dataset(folder))


def test_neighbors_of_another_cutoff_are_counted_with_a_warning(folder):
    data = prepare_data(recipe_for(folder).data)
    with pytest.warns(UserWarning, match="prepare the data with --cutoff 3.5"):
        config = complete_config({**MODEL, "cutoff": 3.5}, data)
    frames = [make_frame(s, 3.5, SPECIES) for s in data.train.structures]
    mean = sum(f.num_edges for f in frames) / sum(f.num_nodes for f in frames)
    assert config.avg_num_neighbors == pytest.approx(max(mean, 1.0))


def test_prepared_and_other_data_go_together(data_file, folder):
    both = dataclasses.replace(recipe_for(folder).data, valid=str(data_file), num_valid=None)
    data = prepare_data(both)
    e0 = LeastSquares().resolve(recipe_module._joined(data))
    assert e0 == pytest.approx(LeastSquares().resolve(load_dataset(data_file)), abs=1e-8)
