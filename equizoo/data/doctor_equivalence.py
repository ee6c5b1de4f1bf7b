"""Whether two frames are one structure, in whatever orientation, atom order, origin and cell."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from equizoo.neighbors import neighbor_list
from equizoo.structure import Structure

TOLERANCE = 1e-3  # [Å] between sorted distances: rounding in a file, not a displacement
REACH = 5.0  # [Å]
_LOOSE = 0.1  # [Å] between atoms brought to coincide by three of them, whose rounding is amplified
_CENTRES = np.linspace(1.0, 4.5, 6)  # [Å] of the fingerprint's Gaussians
_WIDTH = 0.6  # [Å]


def fingerprint(
    lengths: Float[np.ndarray, " edges"],  # [Å]
    senders: Int[np.ndarray, " edges"],
    receivers: Int[np.ndarray, " edges"],
    numbers: Int[np.ndarray, " nodes"],
) -> Float[np.ndarray, " features"]:
    """Means over atoms of smooth sums over pairs within 5 Å: equal for equivalent frames."""
    near = lengths < REACH
    lengths, senders, receivers = lengths[near], senders[near], receivers[near]
    a, b = numbers[senders], numbers[receivers]
    pair = 1 / (1 + np.abs(a - b)) + np.log(a * b + 1.0) / 4  # tells pairs of elements apart
    pair *= 0.5 * (1 + np.cos(np.pi * lengths / REACH))
    basis = np.exp(-0.5 * ((lengths[:, None] - _CENTRES) / _WIDTH) ** 2) * pair[:, None]
    sums = np.stack(
        [np.bincount(receivers, column, minlength=len(numbers)) for column in basis.T], axis=1
    )
    return np.concatenate([sums.mean(axis=0), np.sqrt(np.mean(sums**2, axis=0))])


class _Neighborhood(NamedTuple):
    """Vectors from every atom to those around it, of aperiodic frames to all others."""

    vectors: Float[np.ndarray, "edges 3"]  # [Å] from receiver to sender
    lengths: Float[np.ndarray, " edges"]  # [Å]
    senders: Int[np.ndarray, " edges"]
    receivers: Int[np.ndarray, " edges"]
    sorted_lengths: list[Float[np.ndarray, " edges"]]  # by pair of elements


class Comparison:
    """Compares frames two by two; what it needs of each is computed once."""

    def __init__(self, structures: Sequence[Structure]):
        self._structures = structures
        self._known: dict[int, _Neighborhood] = {}

    def same(self, a: int, b: int) -> bool:
        """Whether an isometry takes every atom of frame ``a`` to one of ``b``, and back.

        Sorted distances (all of an aperiodic frame, those within 5 Å of a periodic one) agree to
        0.001 Å, and a rotation or reflection with a translation, found from an atom with two
        neighbours, takes all atoms to atoms of their element and lattice to lattice.
        """
        return self._same_distances(a, b) and self._isometric(a, b)

    def _same_distances(self, a: int, b: int) -> bool:
        sizes = [self._structures[i].num_nodes for i in (a, b)]
        shared = int(np.gcd(sizes[0], sizes[1]))
        lists = zip(self._around(a).sorted_lengths, self._around(b).sorted_lengths, strict=True)
        for one, other in lists:
            if sizes[0] != sizes[1]:  # as many of each as in the common multiple of the cells
                one = np.repeat(one, sizes[1] // shared)
                other = np.repeat(other, sizes[0] // shared)
            if any(self._structures[a].pbc):  # one may be just beyond the cutoff in the other
                inside = one < REACH - 10 * TOLERANCE
                one, other = one[inside], other[: inside.sum()]
            if len(one) != len(other) or np.any(np.abs(one - other) > TOLERANCE):
                return False
        return True

    def _isometric(self, a: int, b: int) -> bool:
        one, other = self._structures[a], self._structures[b]
        numbers, counts = np.unique(one.atomic_numbers, return_counts=True)
        seldom = numbers[counts.argmin()]
        centre = int(np.flatnonzero(one.atomic_numbers == seldom)[0])
        around = self._around(a)
        arms = np.flatnonzero(around.receivers == centre)
        arms = arms[np.argsort(around.lengths[arms], kind="stable")]
        vectors = around.vectors[arms]
        across = np.linalg.norm(np.cross(vectors[:1], vectors), axis=1)
        if not len(arms) or not (wide := across > 0.3).any():  # [Å^2]
            return True  # an atom, or all on a line: distances say all
        second = int(np.argmax(wide))
        legs = arms[[0, second]]
        elements = one.atomic_numbers[around.senders[legs]]
        for rotation, image in self._candidates(b, int(seldom), vectors[[0, second]], elements):
            moved = (one.positions - one.positions[centre]) @ rotation + other.positions[image]
            if _lies_in(moved, one.atomic_numbers, other).all() and all(
                _lies_in(other.positions + step, other.atomic_numbers, other).all()
                for step in one.cell[list(one.pbc)] @ rotation
            ):
                return True
        return False

    def _candidates(
        self,
        b: int,
        centre: int,
        legs: Float[np.ndarray, "2 3"],  # [Å]
        elements: Int[np.ndarray, "2"],
    ) -> Iterator[tuple[Float[np.ndarray, "3 3"], int]]:
        """Rotations and reflections that take an atom with two neighbours to one in ``b``."""
        around, numbers = self._around(b), self._structures[b].atomic_numbers
        lengths = np.linalg.norm(legs, axis=1)
        product = legs[0] @ legs[1]
        loose = 10 * TOLERANCE
        fits = [
            (np.abs(around.lengths - length) < loose) & (numbers[around.senders] == element)
            for length, element in zip(lengths, elements, strict=True)
        ]
        for image in np.flatnonzero(numbers == centre).tolist():
            start, stop = np.searchsorted(around.receivers, [image, image + 1])
            first, second = (start + np.flatnonzero(fit[start:stop]) for fit in fits)
            products = around.vectors[first] @ around.vectors[second].T
            for i, j in np.argwhere(np.abs(products - product) < loose * lengths.sum()).tolist():
                pair = around.vectors[[first[i], second[j]]]
                for hand in (1.0, -1.0):
                    yield _frame(legs, 1.0).T @ _frame(pair, hand), image

    def _around(self, i: int) -> _Neighborhood:
        if i not in self._known:
            structure = self._structures[i]
            numbers, positions = structure.atomic_numbers, structure.positions
            if any(structure.pbc):
                senders, receivers, shifts = neighbor_list(
                    positions, structure.cell, structure.pbc, REACH
                )
                vectors = positions[senders] - positions[receivers] - shifts @ structure.cell
            else:
                receivers, senders = np.nonzero(~np.eye(len(numbers), dtype=bool))
                vectors = positions[senders] - positions[receivers]
            lengths = np.linalg.norm(vectors, axis=1)
            low = np.minimum(numbers[senders], numbers[receivers])
            high = np.maximum(numbers[senders], numbers[receivers])
            elements = np.unique(numbers).tolist()
            ordered = [
                np.sort(lengths[(low == a) & (high == b)])
                for a in elements
                for b in elements
                if a <= b
            ]
            self._known[i] = _Neighborhood(vectors, lengths, senders, receivers, ordered)
        return self._known[i]


def _frame(legs: Float[np.ndarray, "2 3"], hand: float) -> Float[np.ndarray, "3 3"]:
    """Orthonormal rows: along the first leg, towards the second, across both."""
    along = legs[0] / np.linalg.norm(legs[0])
    towards = legs[1] - (legs[1] @ along) * along
    towards = towards / np.linalg.norm(towards)
    return np.stack([along, towards, hand * np.cross(along, towards)])


def _lies_in(
    positions: Float[np.ndarray, "nodes 3"],  # [Å]
    numbers: Int[np.ndarray, " nodes"],
    structure: Structure,
) -> Bool[np.ndarray, " nodes"]:
    """Whether an atom of that element is at each of the positions."""
    apart = positions[:, None] - structure.positions
    if any(structure.pbc):
        fractions = apart @ np.linalg.pinv(structure.cell)
        apart = apart - (np.round(fractions) * np.array(structure.pbc)) @ structure.cell
    near = np.sum(apart**2, axis=2) < _LOOSE**2
    return (near & (numbers[:, None] == structure.atomic_numbers)).any(axis=1)
