"""Neighbour lists under any periodicity, by vesin."""

import dataclasses
from typing import NamedTuple

import numpy as np
import vesin
from jaxtyping import Bool, Float, Int


class Neighbors(NamedTuple):
    """Directed edges sorted by receiver; both directions of every pair are present.

    ``positions[receivers] - positions[senders] + shifts @ cell`` is the vector from neighbour to
    centre, shorter than the cutoff. An atom is its own neighbour only through a periodic image.
    """

    senders: Int[np.ndarray, " edges"]
    receivers: Int[np.ndarray, " edges"]
    shifts: Int[np.ndarray, "edges 3"]  # in lattice vectors


def neighbor_list(
    positions: Float[np.ndarray, "nodes 3"],  # [Å]
    cell: Float[np.ndarray, "3 3"],  # [Å]
    pbc: tuple[bool, bool, bool] | Bool[np.ndarray, "3"],
    cutoff: float,  # [Å]
) -> Neighbors:
    """All pairs closer than ``cutoff``, for cells of any shape and any subset of periodic axes.

    Cells smaller than the cutoff give several edges per pair and edges from an atom to its own
    images. Along an aperiodic axis the cell is ignored, so it may be zero there. Raises
    ``ValueError`` when ``cutoff`` is not positive.
    """
    if not cutoff > 0:
        raise ValueError(f"cutoff is {cutoff}, expected a positive length in Å.")
    pbc = np.asarray(pbc, dtype=bool)
    i, j, shifts = vesin.NeighborList(cutoff=float(cutoff), full_list=True).compute(
        points=positions, box=complete_cell(cell, pbc), periodic=pbc, quantities="ijS"
    )
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], i, j))
    return Neighbors(
        i[order].astype(np.int32), j[order].astype(np.int32), shifts[order].astype(np.int32)
    )


@dataclasses.dataclass(frozen=True)
class NeighborLimit:
    """Only the nearest neighbours of every atom: how many, and what becomes of ties.

    With ``tolerance=None`` exactly ``count`` edges come in, ties broken by the neighbour's index
    and image. Else all edges whose squared length [Å^2] is at most that of the nearest one beyond
    the ``count`` nearest, plus ``tolerance``: small displacements and the choice of the cell then
    matter less. The energy jumps where the set of neighbours changes, in either case.

    Reference: ``get_max_neighbors_mask`` of fairchem 1.x, strict and with its 0.01.
    """

    count: int
    tolerance: float | None = None  # [Å^2]

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count is {self.count}, expected at least 1.")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"tolerance is {self.tolerance} Å^2, expected 0 or more.")


def nearest_neighbors(
    neighbors: Neighbors,
    positions: Float[np.ndarray, "nodes 3"],  # [Å]
    cell: Float[np.ndarray, "3 3"],  # [Å]
    limit: NeighborLimit,
) -> Neighbors:
    """The edges that ``limit`` keeps, in their order; those of a pair may be kept one way only."""
    senders, receivers, shifts = neighbors
    vectors = positions[receivers] - positions[senders] + shifts @ cell
    # rounding must not decide between edges of one length
    squared = np.round(np.sum(vectors**2, axis=1), 8)
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], senders, squared, receivers))
    counts = np.bincount(receivers, minlength=len(positions))
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - starts[receivers[order]]
    if limit.tolerance is None:
        keep = rank < limit.count
    else:
        longest = np.full(len(positions), np.inf)  # of atoms with few neighbours: all are kept
        beyond = rank == limit.count
        longest[receivers[beyond]] = squared[beyond] + limit.tolerance
        keep = squared <= longest[receivers]
    return Neighbors(senders[keep], receivers[keep], shifts[keep])


def complete_cell(
    cell: Float[np.ndarray, "3 3"], pbc: Bool[np.ndarray, "3"]
) -> Float[np.ndarray, "3 3"]:
    """The cell with its aperiodic vectors replaced by unit vectors orthogonal to the others."""
    completed = np.where(pbc[:, None], cell, 0.0)
    for axis in np.flatnonzero(~pbc):
        null_space = np.linalg.svd(completed)[2][np.linalg.matrix_rank(completed) :]
        completed[axis] = null_space[0]
    return completed
