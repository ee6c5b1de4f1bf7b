"""Frames near each other: what energies, forces and stresses predict of each other between them.

Between two frames of the same atoms at :math:`x_1` and :math:`x_2 = x_1 (1 + \\epsilon) + u`,

.. math:: E_2 - E_1 \\approx -\\tfrac12 (F_1 + F_2) \\cdot u
    + \\tfrac12 (V_1 \\sigma_1 + V_2 \\sigma_2) : \\epsilon ,

exact for a quadratic energy, so that thermal vibrations of one molecule or crystal are near enough.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from equizoo.structure import Structure

FARTHEST = 0.5  # [Å] root mean square displacement of the atoms of a pair
_LARGEST_STRAIN = 0.15
_LARGEST_GROUP = 800  # frames compared with each other; more are thinned out evenly
_SUBSETS = (8, 12, 20, 40, 80, 160, 320)  # nearest pairs that a slope is fitted to
_CONSISTENT = 0.35  # of the energy differences left unexplained


class Pairs(NamedTuple):
    """Pairs of near frames, one row each."""

    first: Int[np.ndarray, " pairs"]  # index of the frame
    second: Int[np.ndarray, " pairs"]
    displacement: Float[np.ndarray, " pairs"]  # [Å] root mean square, with the strain at 1 Å
    energy: Float[np.ndarray, " pairs"]  # difference, as labelled
    forces_work: Float[np.ndarray, " pairs"]  # what forces predict of it
    stress_work: Float[np.ndarray, "pairs 3 3"]  # V sigma * strain, its sum the same of stress
    sheared: Float[np.ndarray, "pairs 6 3"]  # shear work yz, xz, xy for every order of these
    num_nodes: Int[np.ndarray, " pairs"]
    volume: Float[np.ndarray, " pairs"]  # [Å^3]
    force_change: Float[np.ndarray, " pairs"]  # |F2 - F1| over the mean |F1 + F2| / 2

    def of(self, chosen) -> "Pairs":
        return Pairs(*(column[chosen] for column in self))


class Slope(NamedTuple):
    """Energy differences over what other labels predict: 1 if units and signs agree."""

    slope: float
    unexplained: float  # fraction of the energy differences
    num_pairs: int

    @property
    def consistent(self) -> bool:
        return self.num_pairs >= _SUBSETS[0] and self.unexplained < _CONSISTENT


# The six orders in which yz, xz, xy can stand in a file; the first is right.
ORDERS = ((0, 1, 2), (2, 0, 1), (2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0))
_SHEAR = ((1, 2), (0, 2), (0, 1))


def fit_slope(
    differences: Float[np.ndarray, " pairs"],
    predicted: Float[np.ndarray, " pairs"],
    order: Int[np.ndarray, " pairs"],
    subsets: Sequence[int] = _SUBSETS,
) -> Slope:
    """The slope through the origin of least absolute deviation, over the nearest pairs.

    Of the nearest 8, 12, 20, ... pairs (``order``) the subset that is explained best counts: pairs
    farther away are less and less quadratic, but few pairs agree by chance (8 count as 1/8 worse).
    """
    best, least = Slope(np.nan, np.inf, 0), np.inf
    order = order[predicted[order] != 0]
    for size in (*(s for s in subsets if s < len(order)), min(len(order), _SUBSETS[-1])):
        chosen = order[:size]
        a, b = differences[chosen], predicted[chosen]
        if size < 2 or not np.abs(a).sum() > 0:
            continue
        ratios = np.argsort(a / b)
        weight = np.cumsum(np.abs(b)[ratios])
        slope = float((a / b)[ratios[np.searchsorted(weight, weight[-1] / 2)]])
        unexplained = float(np.abs(a - slope * b).sum() / np.abs(a).sum())
        if unexplained + 1 / size < least:
            best, least = Slope(slope, unexplained, size), unexplained + 1 / size
    return best


def near_pairs(structures: Sequence[Structure], strained: bool = False) -> Pairs | None:
    """Every frame with its nearest among those of the same atoms in the same order.

    The cell is the same too, unless ``strained``: then it differs, and frames need a stress.
    Frames without energy or forces do not count. ``None`` when there are no two near frames.
    """
    groups: dict[tuple, list[int]] = {}
    for i, s in enumerate(structures):
        if s.energy is None or s.forces is None or s.num_nodes < 2:
            continue
        if strained and (s.stress is None or not all(s.pbc)):
            continue
        cell = () if strained or not any(s.pbc) else tuple(np.round(s.cell, 5).ravel() + 0.0)
        key = (s.atomic_numbers.tobytes(), s.pbc, cell, s.charge, s.spin)
        groups.setdefault(key, []).append(i)
    found = [
        pairs
        for members in groups.values()
        if len(members) > 1
        for pairs in _of_group(structures, members, strained)
    ]
    if not found:
        return None
    return Pairs(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def _of_group(
    structures: Sequence[Structure], members: list[int], strained: bool
) -> Iterator[Pairs]:
    members = members[:: -(-len(members) // _LARGEST_GROUP)]
    chosen = [structures[i] for i in members]
    positions = np.stack([s.positions for s in chosen])
    cells = np.stack([s.cell for s in chosen])
    periodic = np.array(chosen[0].pbc)
    a, b = _nearest(positions, cells, periodic, strained)
    if not len(a):
        return
    forces = np.stack([np.asarray(s.forces) for s in chosen])
    mean_forces, moved, strain = _moved(positions, cells, forces, a, b, periodic, strained)
    first, second, pulls = forces[a], mean_forces * 2 - forces[a], mean_forces
    apart = np.sqrt(np.mean(np.sum(moved**2, axis=2), axis=1))
    symmetric = 0.5 * (strain + np.swapaxes(strain, 1, 2))
    turned = np.abs(strain - symmetric).max(axis=(1, 2))
    stretch = np.abs(symmetric).max(axis=(1, 2))
    volumes = np.abs(np.linalg.det(cells))
    tensors = np.zeros((len(chosen), 3, 3))
    if strained:
        tensors = np.stack([np.asarray(s.stress) for s in chosen]) * volumes[:, None, None]
    mean = 0.5 * (tensors[a] + tensors[b])
    mean_shear = np.stack([mean[:, i, j] for i, j in _SHEAR], axis=1)
    shear = np.stack([symmetric[:, i, j] for i, j in _SHEAR], axis=1)
    energies = np.array([s.energy for s in chosen])
    size = np.linalg.norm(pulls, axis=(1, 2))
    change = np.linalg.norm(second - first, axis=(1, 2))
    pairs = Pairs(
        first=np.asarray(members)[a],
        second=np.asarray(members)[b],
        displacement=apart + stretch,
        energy=energies[b] - energies[a],
        forces_work=-np.sum(pulls * moved, axis=(1, 2)),
        stress_work=mean * symmetric,
        sheared=np.stack([2 * mean_shear[:, order] * shear for order in map(list, ORDERS)], axis=1),
        num_nodes=np.full(len(a), positions.shape[1]),
        volume=0.5 * (volumes[a] + volumes[b]),
        force_change=change / np.maximum(size, 1e-300),
    )
    near = (apart < FARTHEST) & (stretch < _LARGEST_STRAIN) & (turned < 0.02)
    near &= (pairs.displacement > 1e-5) & ((stretch > 1e-4) | (not strained))
    yield pairs.of(near)


def _nearest(
    positions: Float[np.ndarray, "frames nodes 3"],  # [Å]
    cells: Float[np.ndarray, "frames 3 3"],  # [Å]
    periodic: Bool[np.ndarray, "3"],
    strained: bool,
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """Each frame and the nearest other one (of another cell, if ``strained``), each pair once."""
    num_frames, num_nodes, _ = positions.shape
    if periodic.any():
        cell = cells.mean(axis=0)
        fractions = positions @ np.linalg.pinv(cells)
        steps = fractions - fractions[0]
        steps -= np.round(steps) * periodic
        moved = (fractions[0] + steps) @ cell
        # free of the choice of origin, also where atoms crossed the border
        moved -= steps.mean(axis=1, keepdims=True) @ cell
    else:
        moved = positions - positions.mean(axis=1, keepdims=True)
        moved = moved @ _rotations(moved, np.broadcast_to(moved[:1], moved.shape))
    features = moved.reshape(num_frames, -1) / np.sqrt(num_nodes)
    scale = np.cbrt(np.abs(np.linalg.det(cells)).mean()) if strained else 1.0
    shapes = cells.reshape(num_frames, 9) / scale
    if strained:
        features = np.concatenate([features, shapes], axis=1)
    features = features - features.mean(axis=0)
    squares = np.sum(features**2, axis=1)
    apart = squares[:, None] + squares - 2 * features @ features.T
    np.fill_diagonal(apart, np.inf)
    if strained:
        lengths = np.sum(shapes**2, axis=1)
        differing = lengths[:, None] + lengths - 2 * shapes @ shapes.T
        apart[differing < 1e-6] = np.inf  # the same cell, to 0.1 %
    nearest = apart.argmin(axis=1)
    frames = np.arange(num_frames)
    known = np.isfinite(apart[frames, nearest])
    pairs = np.unique(np.sort(np.stack([frames, nearest], 1)[known], axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]


def _moved(
    positions: Float[np.ndarray, "frames nodes 3"],  # [Å]
    cells: Float[np.ndarray, "frames 3 3"],  # [Å]
    forces: Float[np.ndarray, "frames nodes 3"],
    a: Int[np.ndarray, " pairs"],
    b: Int[np.ndarray, " pairs"],
    periodic: Bool[np.ndarray, "3"],
    strained: bool,
) -> tuple[
    Float[np.ndarray, "pairs nodes 3"],
    Float[np.ndarray, "pairs nodes 3"],
    Float[np.ndarray, "pairs 3 3"],
]:
    """Mean forces, displacements beyond strain [Å], and strain from frames ``a`` to ``b``."""
    if not periodic.any():
        one = positions[a] - positions[a].mean(axis=1, keepdims=True)
        two = positions[b] - positions[b].mean(axis=1, keepdims=True)
        turn = _rotations(two, one)
        return 0.5 * (forces[a] + forces[b] @ turn), two @ turn - one, np.zeros((len(a), 3, 3))
    inverse = np.linalg.pinv(cells)
    steps = positions[b] @ inverse[b] - positions[a] @ inverse[a]
    steps -= np.round(steps) * periodic
    moved = steps @ (0.5 * (cells[a] + cells[b]))
    moved -= moved.mean(axis=1, keepdims=True)
    mean = 0.5 * (forces[a] + forces[b])
    if not strained:
        return mean, moved, np.zeros((len(a), 3, 3))
    gradient = inverse[a] @ cells[b]
    one = np.eye(3)
    return mean, moved, 2 * (gradient - one) @ np.linalg.inv(gradient + one)


def _rotations(
    moving: Float[np.ndarray, "frames nodes 3"], onto: Float[np.ndarray, "frames nodes 3"]
) -> Float[np.ndarray, "frames 3 3"]:
    """Proper rotations R with ``moving @ R`` nearest to ``onto`` (Kabsch); both centred."""
    left, _, right = np.linalg.svd(np.swapaxes(moving, 1, 2) @ onto)
    left = (
        left
        * np.stack(
            [np.ones(len(left)), np.ones(len(left)), np.sign(np.linalg.det(left @ right))], axis=1
        )[:, None, :]
    )
    return left @ right
