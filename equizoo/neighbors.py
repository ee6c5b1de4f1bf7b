"""Neighbour lists under any periodicity, by vesin."""

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
        points=positions, box=_complete_cell(cell, pbc), periodic=pbc, quantities="ijS"
    )
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], i, j))
    return Neighbors(
        i[order].astype(np.int32), j[order].astype(np.int32), shifts[order].astype(np.int32)
    )


def _complete_cell(
    cell: Float[np.ndarray, "3 3"], pbc: Bool[np.ndarray, "3"]
) -> Float[np.ndarray, "3 3"]:
    """The cell with its aperiodic vectors replaced by unit vectors orthogonal to the others."""
    completed = np.where(pbc[:, None], cell, 0.0)
    for axis in np.flatnonzero(~pbc):
        null_space = np.linalg.svd(completed)[2][np.linalg.matrix_rank(completed) :]
        completed[axis] = null_space[0]
    return completed
