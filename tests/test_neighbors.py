"""Neighbour lists against a sum over images, for any cell and any periodicity."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equizoo.neighbors import NeighborLimit, nearest_neighbors, neighbor_list

ALL_PBC = list(itertools.product((False, True), repeat=3))
CUTOFF = 3.0
SEEDS = st.integers(0, 2**32 - 1)


def images(cell, pbc, positions, cutoff):
    """Enough images for a sphere of the cutoff around atoms in and out of the cell."""
    ranges = []
    for axis in range(3):
        if not pbc[axis]:
            ranges.append((0,))
            continue
        others = [cell[k] for k in range(3) if k != axis and pbc[k]]
        height = cell[axis] - sum(
            (cell[axis] @ v) * v for v in np.linalg.qr(np.array(others).T)[0].T
        ) if others else cell[axis]  # fmt: skip
        extent = np.linalg.norm(np.ptp(positions, axis=0))
        n = int(np.ceil((cutoff + extent) / np.linalg.norm(height)))
        ranges.append(range(-n, n + 1))
    return itertools.product(*ranges)


def brute_force(positions, cell, pbc, cutoff):
    edges = set()
    for shift in images(cell, pbc, positions, cutoff):
        vectors = positions[:, None] - positions[None] + np.array(shift) @ cell
        close = np.sum(vectors**2, axis=-1) < cutoff**2
        if shift == (0, 0, 0):
            np.fill_diagonal(close, False)
        edges |= {(int(j), int(i), *shift) for i, j in zip(*np.nonzero(close), strict=True)}
    return edges


def as_list(neighbors):
    return [tuple(map(int, e)) for e in np.column_stack(neighbors)]


def random_cell(rng, scale):
    cell = scale * (np.eye(3) + 0.3 * rng.normal(size=(3, 3)))
    return cell if abs(np.linalg.det(cell)) > 0.2 * scale**3 else scale * np.eye(3)


@pytest.mark.parametrize("pbc", ALL_PBC, ids=str)
@pytest.mark.parametrize("scale", [1.7, 5.0])  # [Å] cells smaller and larger than the cutoff
@given(seed=SEEDS)
def test_equals_a_sum_over_images(pbc, scale, seed):
    rng = np.random.default_rng(seed)
    cell = random_cell(rng, scale)
    positions = rng.normal(size=(4, 3)) @ cell  # in and out of the cell
    expected = brute_force(positions, cell, pbc, CUTOFF)
    found = as_list(neighbor_list(positions, cell, pbc, CUTOFF))
    assert len(found) == len(set(found))
    assert set(found) == expected


@given(seed=SEEDS)
def test_sorted_by_receiver_and_every_edge_has_its_reverse(seed):
    rng = np.random.default_rng(seed)
    cell, positions = random_cell(rng, 2.5), rng.normal(size=(5, 3))
    neighbors = neighbor_list(positions, cell, (True, True, False), CUTOFF)
    assert np.all(np.diff(neighbors.receivers) >= 0)
    edges = set(as_list(neighbors))
    assert edges == {(i, j, -a, -b, -c) for j, i, a, b, c in edges}
    assert all(part.dtype == np.int32 for part in neighbors)


def test_the_vector_points_from_sender_to_receiver():
    positions, cell = np.array([[0.1, 0, 0], [3.8, 0, 0]]), np.diag([4.0, 9, 9])
    neighbors = neighbor_list(positions, cell, (True, False, False), 1.0)
    vectors = positions[neighbors.receivers] - positions[neighbors.senders]
    vectors += neighbors.shifts @ cell
    np.testing.assert_array_equal(neighbors.receivers, [0, 1])
    np.testing.assert_allclose(vectors, [[0.3, 0, 0], [-0.3, 0, 0]], atol=1e-15)


def test_the_cell_is_ignored_where_aperiodic():
    rng = np.random.default_rng(0)
    positions, cell = rng.normal(size=(6, 3)), random_cell(rng, 2.0)
    pbc = (True, False, True)
    zeroed = np.where(np.array(pbc)[:, None], cell, 0.0)
    assert as_list(neighbor_list(positions, cell, pbc, CUTOFF)) == as_list(
        neighbor_list(positions, zeroed, pbc, CUTOFF)
    )


def test_a_single_atom():
    at = np.zeros((1, 3))
    assert as_list(neighbor_list(at, np.zeros((3, 3)), (False,) * 3, CUTOFF)) == []
    own_images = as_list(neighbor_list(at, np.diag([2.0, 9, 9]), (True,) * 3, CUTOFF))
    assert own_images == [(0, 0, -1, 0, 0), (0, 0, 1, 0, 0)]


def test_atoms_out_of_reach_have_no_neighbours():
    positions = np.array([[0.0, 0, 0], [1, 0, 0], [50, 0, 0]])
    neighbors = neighbor_list(positions, np.zeros((3, 3)), (False,) * 3, CUTOFF)
    assert as_list(neighbors) == [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0)]


@pytest.mark.parametrize("cutoff", [0.0, -1.0, float("nan")])
def test_a_cutoff_that_is_no_length(cutoff):
    with pytest.raises(ValueError, match="expected a positive length"):
        neighbor_list(np.zeros((1, 3)), np.zeros((3, 3)), (False,) * 3, cutoff)


# ---- the nearest only --------------------------------------------------------------------------


def squared_lengths(near, positions, cell):
    vectors = positions[near.receivers] - positions[near.senders] + near.shifts @ cell
    return np.sum(vectors**2, axis=1)


@pytest.mark.parametrize("lattice", [False, True], ids=["random", "lattice with ties"])
@pytest.mark.parametrize("tolerance", [None, 0.0, 0.01, 0.5])
@pytest.mark.parametrize("count", [1, 6, 13])
def test_nearest_neighbors_of_each_atom(count, tolerance, lattice):
    """Strictly as many, or with all about as near as the first beyond: atom by atom."""
    rng = np.random.default_rng(0)
    cell = 2.1 * np.eye(3) if lattice else 4 * np.eye(3) + 0.5 * rng.normal(size=(3, 3))
    positions = np.zeros((1, 3)) if lattice else rng.uniform(0, 4, (7, 3))
    near = neighbor_list(positions, cell, (True, True, True), 3.5)
    kept = nearest_neighbors(near, positions, cell, NeighborLimit(count, tolerance))
    every, found = (squared_lengths(n, positions, cell) for n in (near, kept))
    for atom in range(len(positions)):
        lengths = np.sort(every[near.receivers == atom])
        if len(lengths) > count:
            reach = np.inf if tolerance is None else lengths[count] + tolerance + 1e-9
            expected = lengths[:count] if tolerance is None else lengths[lengths <= reach]
        else:
            expected = lengths
        np.testing.assert_allclose(np.sort(found[kept.receivers == atom]), expected, atol=1e-12)
    whole, part = (
        [tuple(row) for row in np.column_stack([n.senders, n.receivers, n.shifts]).tolist()]
        for n in (near, kept)
    )
    assert len(set(part)) == len(part) and set(part) <= set(whole)
    assert (np.diff(kept.receivers) >= 0).all()


def test_ties_do_not_hang_on_rounding():
    """All twelve or none of the edges of one length in a lattice: the choice is by image."""
    cell = 2.1 * np.eye(3)
    at_origin, moved = np.zeros((1, 3)), np.array([[0.1, -3.3, 1 / 3]])
    lists = [neighbor_list(x, cell, (True, True, True), 3.5) for x in (at_origin, moved)]
    kept = [
        nearest_neighbors(near, x, cell, NeighborLimit(8))
        for near, x in zip(lists, (at_origin, moved), strict=True)
    ]
    np.testing.assert_array_equal(kept[0].shifts, kept[1].shifts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"count": 0}, "at least 1"), ({"count": 1, "tolerance": -1.0}, "or more")],
)
def test_impossible_limits(fields, message):
    with pytest.raises(ValueError, match=message):
        NeighborLimit(**fields)
