"""The stream of batches: nothing lost, nothing repeated, exactly resumable."""

import json
from collections import Counter

import jax
import numpy as np
import pytest
from ase import Atoms

from equizoo.data.pipeline import Packing, sequential_batches, training_stream
from equizoo.graph import Budget, make_frame
from equizoo.structure import Structure


@pytest.fixture(scope="module")
def frames():
    rng = np.random.default_rng(0)
    structures = []
    for index in range(40):
        size = int(rng.integers(1, 9))
        atoms = Atoms("H" * size, rng.uniform(0, 4, (size, 3)))
        structure = Structure.from_atoms(atoms, f"h[{index}]")
        structures.append(structure)
    # the cell carries an identity through batching
    marked = [
        Structure(s.atomic_numbers, s.positions, np.eye(3) * (i + 1), name=s.name)
        for i, s in enumerate(structures)
    ]
    return [make_frame(s, 3.0, (1,)) for s in marked]


@pytest.fixture(scope="module")
def packing(frames):
    return Packing(Budget.of(frames, nodes=24, graphs=8), np.zeros(1))


def sizes(graph):
    return np.bincount(graph.node_graph[graph.node_mask], minlength=graph.num_graphs)[
        graph.graph_mask
    ]


def fingerprint(batch):
    return b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(batch))


def test_every_pass_sees_every_frame_once(frames, packing):
    stream = training_stream(frames, packing, seed=1)
    seen = []
    while len(seen) < 3 * len(frames):
        graph, _ = next(stream)
        positions = np.split(graph.positions[graph.node_mask], np.cumsum(sizes(graph))[:-1])
        seen += [p.tobytes() for p in positions]
    expected = Counter(
        (f.structure.positions - f.structure.positions.mean(0)).astype(np.float32).tobytes()
        for f in frames
    )
    passes = [Counter(seen[i * len(frames) : (i + 1) * len(frames)]) for i in range(3)]
    assert passes[0] == passes[1] == passes[2] == expected
    assert seen[: len(frames)] != seen[len(frames) : 2 * len(frames)]  # reshuffled


def test_state_is_small_json_and_resumes_to_the_same_batches(frames, packing):
    stream = training_stream(frames, packing, seed=2)
    for _ in range(7):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    assert len(json.dumps(state)) < 200
    following = [fingerprint(next(stream)) for _ in range(12)]
    again = training_stream(frames, packing, seed=2)
    again.set_state(state)
    assert [fingerprint(next(again)) for _ in range(12)] == following
    other = training_stream(frames, packing, seed=3)
    other.set_state(state)
    assert [fingerprint(next(other)) for _ in range(12)] != following


def test_batches_fill_the_budget(frames, packing):
    stream = training_stream(frames, packing, seed=0)
    for _ in range(10):
        graph, _ = next(stream)
        spare = packing.budget.nodes - 1 - int(graph.node_mask.sum())
        assert spare < 8 or graph.graph_mask.sum() == packing.budget.graphs - 1


def test_sequential_batches_keep_order_and_lose_nothing(frames, packing):
    batches = list(sequential_batches(frames, packing))
    assert [f.structure.name for held, *_ in batches for f in held] == [
        f.structure.name for f in frames
    ]
    for held, graph, _ in batches:
        assert sizes(graph).tolist() == [f.num_nodes for f in held]


def test_a_frame_larger_than_the_budget_is_refused_by_name(frames):
    small = Packing(Budget.of(frames[:1]), np.zeros(1))
    with pytest.raises(ValueError, match=r"h\[\d+\] with \d+ atoms .* does not fit"):
        training_stream(frames, small, seed=0)
