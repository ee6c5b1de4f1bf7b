"""The same structure twice, in one data set or in two, whatever its orientation, order or cell."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from equizoo.data.doctor_elements import frames_with
from equizoo.data.doctor_equivalence import TOLERANCE, Comparison
from equizoo.data.doctor_findings import Finding, Verdict, named
from equizoo.data.doctor_frames import REACH, FrameFacts, measure
from equizoo.data.readers import Dataset
from equizoo.structure import Structure, symbols

_SAME_ENERGY = 5e-3  # [eV/atom]
_RADIUS = 3e-3  # between fingerprints; TOLERANCE moves them less, unless all distances grow
_MOST_CANDIDATES = 50  # per frame; looked at nearest first


class Pair(NamedTuple):
    """Two frames with the same structure."""

    first: int
    second: int
    exact: bool  # the same positions in the same order, too


def find_pairs(
    structures: Sequence[Structure], facts: Sequence[FrameFacts], boundary: int = 0
) -> tuple[list[Pair], int]:
    """Symmetry-equivalent frames, and how many candidates were too many to be compared.

    Two frames are equivalent when a rotation, reflection, translation or permutation of equal
    atoms, or another choice of the periodic cell, takes one to the other; see
    :meth:`Comparison.same`. With ``boundary`` only pairs with one frame before it and one after.
    """
    groups: dict[tuple, list[int]] = {}
    for i, structure in enumerate(structures):
        groups.setdefault(_kind(structure), []).append(i)
    pairs: list[Pair] = []
    skipped = 0
    compare = Comparison(structures)
    for members in groups.values():
        candidates = cKDTree(np.stack([facts[i].fingerprint for i in members])).query_pairs(
            _RADIUS, output_type="ndarray"
        )
        indices = np.sort(np.asarray(members)[candidates], axis=1)
        if boundary:
            indices = indices[(indices[:, 0] < boundary) & (indices[:, 1] >= boundary)]
        apart = np.array(
            [np.abs(facts[a].fingerprint - facts[b].fingerprint).max() for a, b in indices.tolist()]
        )
        order = np.argsort(apart, kind="stable")[: _MOST_CANDIDATES * len(members)]
        skipped += len(indices) - len(order)
        for a, b in indices[order].tolist():
            if compare.same(a, b):
                pairs.append(Pair(a, b, _identical(structures[a], structures[b])))
    return sorted(pairs), skipped


def _kind(structure: Structure) -> tuple:
    """What equivalent frames share exactly: stoichiometry, charge and the like."""
    elements, counts = np.unique(structure.atomic_numbers, return_counts=True)
    periodic = any(structure.pbc)
    share = np.gcd.reduce(counts) if periodic else 1  # a supercell is the same crystal
    return (
        tuple(elements.tolist()),
        tuple((counts // share).tolist()),
        sum(structure.pbc),
        structure.charge / (structure.num_nodes if periodic else 1),
        structure.spin,
        structure.head,
    )


def _identical(a: Structure, b: Structure) -> bool:
    return (
        np.array_equal(a.atomic_numbers, b.atomic_numbers)
        and np.allclose(a.positions, b.positions, rtol=0, atol=TOLERANCE)
        and np.allclose(a.cell, b.cell, rtol=0, atol=TOLERANCE)
    )


def held_by(dataset: Dataset, others: Sequence[Dataset]) -> list[set[int]]:
    """For each of the others, the frames of ``dataset`` that it has too, also by symmetry."""
    structures = [*dataset.structures, *(s for other in others for s in other.structures)]
    facts = [measure(structure, REACH) for structure in structures]
    pairs, _ = find_pairs(structures, facts, len(dataset))
    ends = len(dataset) + np.cumsum([len(other) for other in others])
    found: list[set[int]] = [set() for _ in others]
    for pair in pairs:
        found[int(np.searchsorted(ends, pair.second, side="right"))].add(pair.first)
    return found


# ---- checks


def duplicates(dataset: Dataset, facts: Sequence[FrameFacts]) -> Iterator[Finding]:
    """Structures that are in the data set more than once, and such with different labels."""
    structures = dataset.structures
    pairs, skipped = find_pairs(structures, facts)
    repeated = sorted({pair.second for pair in pairs})
    if pairs:
        exact = len({pair.second for pair in pairs if pair.exact})
        yield Finding(
            "duplicates",
            Verdict.WARNING,
            f"{len(repeated)} frames repeat an earlier one: {exact} with the same positions, "
            f"{len(repeated) - exact} by symmetry",
            len(repeated),
            _pair_names(structures, pairs),
            "Split by structure, not at random: else the validation set holds training frames.",
        )
    contradicting = [
        pair for pair in pairs if _energies_differ(structures[pair.first], structures[pair.second])
    ]
    if contradicting:
        yield Finding(
            "duplicates",
            Verdict.WARNING,
            "pairs of the same structure have energies that differ by more than 5 meV/atom",
            len(contradicting),
            _pair_names(structures, contradicting),
            "Two levels of theory, two electronic states, or a calculation that failed?",
        )
    if skipped:
        yield _too_many("duplicates", skipped)


def leakage(
    dataset: Dataset,
    facts: Sequence[FrameFacts],
    other: Dataset,
    other_facts: Sequence[FrameFacts],
) -> Iterator[Finding]:
    """Frames of ``other``, by which errors are judged, that are in the data set already."""
    structures = [*dataset.structures, *other.structures]
    pairs, skipped = find_pairs(structures, [*facts, *other_facts], len(dataset))
    leaked = sorted({pair.second for pair in pairs})
    check = f"leakage into {other.name}"
    if leaked:
        exact = len({pair.second for pair in pairs if pair.exact})
        yield Finding(
            check,
            Verdict.ERROR,
            f"{len(leaked)} of its {len(other)} frames are in {dataset.name} too: {exact} with the "
            f"same positions, {len(leaked) - exact} by symmetry",
            len(leaked),
            _pair_names(structures, pairs),
            "Errors on them say nothing about new structures: leave them out on one side.",
        )
    if skipped:
        yield _too_many(check, skipped)
    unseen = [z for z in other.elements if z not in dataset.elements]
    if unseen:
        frames = frames_with(other.structures, unseen)
        yield Finding(
            f"elements of {other.name}",
            Verdict.ERROR,
            f"it has {symbols(unseen)}, which {dataset.name} lacks",
            len(frames),
            named(other.structures, frames),
            "A model trained on this data cannot be evaluated there.",
        )


def _energies_differ(a: Structure, b: Structure) -> bool:
    if a.energy is None or b.energy is None:
        return False
    return abs(a.energy / a.num_nodes - b.energy / b.num_nodes) > _SAME_ENERGY


def _pair_names(structures: Sequence[Structure], pairs: Sequence[Pair]) -> tuple[str, ...]:
    shown = [named(structures, (pair.first, pair.second)) for pair in pairs[:3]]
    return tuple(f"{second} = {first}" for first, second in shown)


def _too_many(check: str, skipped: int) -> Finding:
    message = f"{skipped} pairs of very similar frames were not compared, the nearest ones were"
    return Finding(check, Verdict.NOTE, message, skipped)
