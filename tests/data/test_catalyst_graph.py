"""The graph of OC20's and OC22's models against plain loops over images, written from the rule.

The rule: every axis counts as periodic; an atom receives from all atoms of all images up to the
cutoff, itself at no distance excepted; of these the nearest so many are kept, or with a tolerance
all whose squared distance is at most that of the first one beyond, plus the tolerance in Å^2.
Which of several at one distance are kept is left open where exactly so many are asked for.
"""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111

from equizoo.data.catalyst import open_catalyst
from equizoo.graph import make_frame
from equizoo.neighbors import NeighborLimit
from equizoo.structure import EnergyReference, Structure
from equizoo.zoo.equiformer_v2 import SIZES

FOLDERS = [Path(f) for f in os.environ.get("EQUIZOO_DATA", "").split(os.pathsep) if f]
DATA = next((f for f in FOLDERS if (f / "oc20_relax").is_dir()), None)
CUTOFF = 12.0  # [Å] of the published models
STRICT, TOLERANT = NeighborLimit(20), NeighborLimit(20, tolerance=0.01)
SAME = 1e-6  # [Å^2] squared distances closer than this may come in either order
ITSELF = 1e-4  # [Å^2]


def all_within(structure: Structure, receiver: int, cutoff: float) -> dict[tuple, float]:
    """Squared distances [Å^2] of all that an atom sees, by neighbour and image.

    Images are those of atoms wrapped into the cell.
    """
    positions = structure.positions - lattice_points(structure) @ structure.cell
    reciprocal = np.linalg.inv(structure.cell).T  # rows
    reach = [int(np.ceil(cutoff * np.linalg.norm(row))) for row in reciprocal]
    found = {}
    for image in itertools.product(*(range(-n, n + 1) for n in reach)):
        away = positions + np.array(image) @ structure.cell - positions[receiver]
        squares = np.sum(away**2, axis=1)
        for sender in np.flatnonzero((squares <= cutoff**2) & (squares > ITSELF)):
            found[int(sender), *image] = float(squares[sender])
    return found


def lattice_points(structure: Structure) -> np.ndarray:
    """How many lattice vectors each atom is away from the cell."""
    fractional = np.linalg.solve(structure.cell.T, structure.positions.T).T
    return np.floor(fractional).astype(int)


def kept_by_the_rule(
    squares: dict[tuple, float], limit: NeighborLimit
) -> tuple[set[tuple], set[tuple]]:
    """The neighbours that must be kept, and those that may be."""
    order = sorted(squares.values())
    if len(order) <= limit.count:
        return set(squares), set(squares)
    if limit.tolerance is None:
        last = order[limit.count - 1]
    else:
        last = order[limit.count] + limit.tolerance
    return (
        {edge for edge, square in squares.items() if square < last - SAME},
        {edge for edge, square in squares.items() if square <= last + SAME},
    )


def check(structure: Structure, limit: NeighborLimit, cutoff: float = CUTOFF, every: int = 1):
    """Compares what every so manieth atom receives; the numbers of these edges."""
    elements = np.unique(structure.atomic_numbers).tolist()
    neighbors = make_frame(structure, cutoff, elements, limit=limit).neighbors
    wrap = lattice_points(structure)
    counts = []
    for receiver in range(0, structure.num_nodes, every):
        here = neighbors.receivers == receiver
        senders, shifts = neighbors.senders[here], neighbors.shifts[here]
        # positions[receiver] - positions[sender] + shift @ cell points from the sender's image
        images = wrap[senders] - wrap[receiver] - shifts
        ours = {(int(j), *map(int, image)) for j, image in zip(senders, images, strict=True)}
        assert len(ours) == len(senders)
        squares = all_within(structure, receiver, cutoff)
        must, may = kept_by_the_rule(squares, limit)
        assert must <= ours <= may
        if limit.tolerance is None:
            assert len(ours) == min(limit.count, len(squares))
        counts.append(len(ours))
    return counts


def structure(atoms: Atoms) -> Structure:
    atoms.pbc = True  # slabs too
    return Structure.from_atoms(atoms)


def real_systems(name: str) -> list[Structure]:
    assert DATA is not None
    frames = open_catalyst(DATA / name, EnergyReference.TOTAL)
    return list({frame.sid: frame.structure for frame in frames}.values())


@pytest.mark.skipif(DATA is None, reason="needs oc20_relax and oc22_sample in EQUIZOO_DATA")
@pytest.mark.parametrize("limit", [STRICT, TOLERANT], ids=["strict", "tolerant"])
@pytest.mark.parametrize(
    "name", ["oc20_relax/lmdb/s2ef/train_100", "oc20_relax/s2ef_val", "oc22_sample/lmdb/train"]
)
def test_real_surfaces(name, limit):
    counts: list[int] = []
    for system in real_systems(name):
        assert system.pbc == (True, True, True)
        counts += check(system, limit, every=7)
    assert len(counts) > 20
    if limit is TOLERANT:  # the first one beyond is always among them
        assert min(counts) > limit.count


@pytest.mark.skipif(DATA is None, reason="needs oc20_relax in EQUIZOO_DATA")
def test_few_neighbors_within_a_short_cutoff():
    """Atoms with fewer than the limit keep all, others in the same frame are cut."""
    system = real_systems("oc20_relax/s2ef_val")[0]
    counts = check(system, STRICT, cutoff=5.5)
    assert min(counts) < STRICT.count == max(counts)


@pytest.mark.parametrize(
    ("count", "tolerance", "expected"),
    [
        (12, None, 12),  # the whole first shell of an fcc crystal
        (12, 0.01, 12 + 6),  # and the second, where the first one beyond is
        (18, None, 18),
        (20, None, 20),  # two of the 24 of the third shell
        (20, 0.01, 12 + 6 + 24),
        (43, 0.01, 12 + 6 + 24 + 12),
    ],
)
@pytest.mark.parametrize("repeat", [1, 2])
def test_shells_of_a_crystal(count, tolerance, expected, repeat):
    crystal = structure(bulk("Cu", "fcc", a=3.6).repeat(repeat))
    assert set(check(crystal, NeighborLimit(count, tolerance))) == {expected}


@pytest.mark.parametrize("limit", [STRICT, TOLERANT], ids=["strict", "tolerant"])
@pytest.mark.parametrize("site", ["ontop", "hcp"])
def test_a_surface_full_of_ties(site, limit):
    """A clean slab, an adsorbate on it, atoms outside of the cell, an image through the vacuum."""
    slab = fcc111("Pt", size=(2, 3, 3), a=3.92, vacuum=3.0)
    add_adsorbate(slab, "O", 1.3, site)
    slab.positions += [-7.0, 3.1, 25.0]
    counts = check(structure(slab), limit)
    if limit is TOLERANT:
        assert max(counts) > limit.count + 1


def test_the_tolerance_is_of_squared_distances():
    """0.01 Å^2 at 3 Å are 1.7 mÅ: the third atom is beyond, though 2 mÅ are less than 0.01 Å."""
    away = np.array([[3.0, 0, 0], [0, 3.0016, 0], [0, 0, 3.002]])
    box = Atoms("H4", np.concatenate([np.zeros((1, 3)), away]) + 20, cell=40 * np.eye(3))
    at_first = check(structure(box), NeighborLimit(1, tolerance=0.01), cutoff=6.0)[0]
    assert at_first == 2 + 1  # 3.002^2 is within 0.01 of 3.0016^2, the first one beyond
    alone = Atoms("H3", box.positions[[0, 1, 3]], cell=box.cell)
    assert check(structure(alone), NeighborLimit(1, tolerance=0.01), cutoff=6.0)[0] == 2
    away[2, 2] = 3.0035
    box.positions[1:] = away + 20
    assert check(structure(box), NeighborLimit(1, tolerance=0.01), cutoff=6.0)[0] == 2


def test_published_models_have_this_rule():
    limits = {name: options["neighbor_limit"] for name, options in SIZES.items()}
    assert limits.pop("oc22_121m") == TOLERANT
    assert set(limits.values()) == {STRICT} and len(limits) == 3
