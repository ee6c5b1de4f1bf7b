"""Corrupted structures: which atoms move, how far, and what neighbours and targets they get."""

import dataclasses
import json
from collections import Counter

import jax
import numpy as np
import pytest
from ase import Atoms

from equizoo.data.corruption import Corruption, Corruptor, log_spaced
from equizoo.data.pipeline import Packing, training_stream
from equizoo.graph import Budget, batch_frames, batch_labels, make_frame
from equizoo.neighbors import neighbor_list
from equizoo.structure import Structure

CUTOFF = 2.0
EVERYTHING = Corruption(probability=1.0, fraction=1.0, noise=(0.2,))
HALF = Corruption(probability=0.5, fraction=0.5, noise=(0.3,))


def frame_of(structure):
    return make_frame(structure, CUTOFF, (1,))


def labelled(nodes, seed=0, **info):
    rng = np.random.default_rng(seed)
    structure = Structure.from_atoms(Atoms("H" * nodes, rng.uniform(0, 4, (nodes, 3))), f"h{seed}")
    forces = rng.normal(size=(nodes, 3))
    return dataclasses.replace(structure, energy=float(seed), forces=forces, info=info)


@pytest.fixture(scope="module")
def frames():
    return [frame_of(labelled(3 + i % 6, i)) for i in range(40)]


@pytest.fixture(scope="module")
def packing(frames):
    roomy = dataclasses.replace(Budget.of(frames, nodes=24, graphs=8), slots=None, out_slots=None)
    return Packing(dataclasses.replace(roomy, edges=400), np.zeros(1))


def bytes_of(batch):
    return b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(batch))


# ---- one structure


def test_noise_has_the_deviation_that_was_asked_for():
    structure = labelled(4000)
    moved, noise = HALF.displaced(structure, np.random.default_rng(0))
    displacements = moved.positions - structure.positions
    assert noise.mask.mean() == pytest.approx(0.5, abs=0.03)
    assert not displacements[~noise.mask].any()
    assert displacements[noise.mask].std() == pytest.approx(0.3, rel=0.03)
    np.testing.assert_allclose(noise.displacements, displacements / 0.3, atol=1e-9)
    assert moved.energy == structure.energy and moved.forces is structure.forces


def test_each_structure_has_one_of_several_deviations():
    corruption = Corruption(probability=1.0, fraction=1.0, noise=log_spaced(0.01, 0.5, 3))
    assert corruption.noise == pytest.approx((0.01, 0.5 * 0.02**0.5, 0.5))
    rng = np.random.default_rng(0)
    found = Counter()
    for seed in range(60):
        _, noise = corruption.displaced(labelled(500, seed), rng)
        nearest = min(corruption.noise, key=lambda s: abs(noise.displacements.std() * 0.5 - s))
        assert noise.displacements.std() * 0.5 == pytest.approx(nearest, rel=0.1)
        found[nearest] += 1
    assert min(found[level] for level in corruption.noise) > 8


def test_fixed_atoms_spared_structures_and_those_without_forces_stay():
    rng = np.random.default_rng(0)
    fixed = labelled(6, fixed=np.array([True, True, False, False, False, False]))
    moved, noise = EVERYTHING.displaced(fixed, rng)
    assert noise.mask.tolist() == [False, False, True, True, True, True]
    assert np.array_equal(moved.positions[:2], fixed.positions[:2])
    spared = dataclasses.replace(EVERYTHING, spared="md")
    for structure, still in ((labelled(6, md=True), True), (labelled(6, md=False), False)):
        moved, noise = spared.displaced(structure, rng)
        assert (moved is structure) == still == (not noise.mask.any())
    unlabelled = dataclasses.replace(labelled(6), forces=None)
    assert EVERYTHING.displaced(unlabelled, rng)[0] is unlabelled


def test_a_stress_of_before_is_no_label_of_what_has_moved():
    cell = np.diag([5.0, 5.0, 5.0])
    crystal = dataclasses.replace(labelled(4), cell=cell, pbc=(True,) * 3, stress=np.eye(3))
    assert EVERYTHING.displaced(crystal, np.random.default_rng(0))[0].stress is None
    never = dataclasses.replace(EVERYTHING, spared="md")
    kept = dataclasses.replace(crystal, info={"md": True})
    assert never.displaced(kept, np.random.default_rng(0))[0].stress is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"probability": 0.0}, "probability is 0.0, expected within"),
        ({"fraction": 1.5}, "fraction is 1.5, expected within"),
        ({"noise": ()}, "one or more standard deviations"),
        ({"noise": (0.1, -0.1)}, "all positive"),
    ],
    ids=str,
)
def test_bad_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HALF, **fields)


# ---- frames and batches


def test_neighbours_are_those_of_the_displaced_atoms(frames):
    corruptor = Corruptor(EVERYTHING, frame_of)
    changed = 0
    for seed, frame in enumerate(frames):
        corrupted = corruptor.corrupted(frame, seed)
        structure = corrupted.structure
        expected = neighbor_list(structure.positions, structure.cell, structure.pbc, CUTOFF)
        for found, wanted in zip(corrupted.neighbors, expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
        changed += len(expected.senders) != frame.num_edges
    assert changed > len(frames) / 2


def test_targets_and_inputs_of_a_batch_by_hand(frames, packing):
    corruptor = Corruptor(HALF, frame_of)
    held = [corruptor.corrupted(frames[4], 1), frames[5]]
    noise = held[0].noise
    assert noise.mask.any() and not noise.mask.all()
    graph = batch_frames(held, packing.budget, np.float64)
    labels = batch_labels(held, packing.budget, np.zeros(1), np.float64)
    n, m = (frame.num_nodes for frame in held)
    forces = frames[4].structure.forces
    np.testing.assert_array_equal(graph.given_forces[:n], forces * noise.mask[:, None])
    assert not graph.given_forces[n:].any()
    np.testing.assert_array_equal(labels.noise[:n], noise.displacements)
    np.testing.assert_array_equal(labels.noise_mask[:n], noise.mask)
    np.testing.assert_array_equal(labels.forces_mask[:n], ~noise.mask)
    assert labels.forces_mask[n : n + m].all() and not labels.noise_mask[n:].any()
    assert labels.energy[0] == frames[4].structure.energy
    moved = held[0].structure.positions
    np.testing.assert_allclose(graph.positions[:n], moved - moved.mean(axis=0), atol=1e-12)


# ---- the stream


def test_a_coin_for_each_batch_and_one_form_for_all(frames, packing):
    stream = training_stream(frames, packing, 0, Corruptor(HALF, frame_of))
    heads, atoms = [], []
    for _ in range(60):
        graph, labels = next(stream)
        assert graph.given_forces.shape == labels.noise.shape == (packing.budget.nodes, 3)
        members = graph.node_graph[labels.noise_mask]
        heads.append(bool(len(members)))
        if heads[-1]:  # a fraction of the atoms of all structures
            assert len(set(members.tolist())) > 1
            atoms.append(labels.noise_mask.sum() / graph.node_mask.sum())
    assert 0.3 < np.mean(heads) < 0.7
    assert np.mean(atoms) == pytest.approx(0.5, abs=0.08)


def test_corruption_resumes_exactly_and_is_new_in_every_pass(frames, packing):
    corruptor = Corruptor(EVERYTHING, frame_of)
    stream = training_stream(frames, packing, 2, corruptor)
    for _ in range(5):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    following = [bytes_of(next(stream)) for _ in range(12)]
    again = training_stream(frames, packing, 2, corruptor)
    again.set_state(state)
    assert [bytes_of(next(again)) for _ in range(12)] == following
    passes, total = [], 0
    stream = training_stream(frames, packing, 2, corruptor)
    while total < 3 * len(frames):
        _, labels = next(stream)
        total += int(labels.energy_mask.sum())
        passes += [row.tobytes() for row in labels.noise[labels.noise_mask]]
    assert len(set(passes)) == len(passes)


def test_the_order_of_frames_does_not_depend_on_corruption(frames, packing):
    plain = training_stream(frames, packing, 1)
    noisy = training_stream(frames, packing, 1, Corruptor(HALF, frame_of))
    for _ in range(20):
        (graph, labels), (_, other) = next(plain), next(noisy)
        assert graph.given_forces is None and labels.noise is None and labels.noise_mask is None
        np.testing.assert_array_equal(labels.energy, other.energy)


def test_frames_whose_noise_no_batch_has_room_for_stay(frames):
    tight = Budget.of(frames[:1])
    wild = Corruptor(Corruption(probability=1.0, fraction=1.0, noise=(1e-6, 2.0)), frame_of)
    one = frames[:1]
    stream = training_stream(one, Packing(tight, np.zeros(1)), 0, wild)
    for _ in range(20):
        graph, _ = next(stream)
        assert graph.node_mask.sum() == one[0].num_nodes
    crowded = [frame_of(labelled(8, 3))._replace(max_in=0)]
    corruptor = Corruptor(EVERYTHING, lambda structure: crowded[0]._replace(max_in=99))
    exact = dataclasses.replace(tight, nodes=12, slots=8, out_slots=8, edges=96)
    _, labels = next(training_stream(crowded, Packing(exact, np.zeros(1)), 0, corruptor))
    assert not labels.noise_mask.any() and labels.forces_mask.sum() == 8
