"""What a data set's frames are like one by one: distances, fragments, net forces, outliers."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ase.data import covalent_radii
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from equizoo.data.doctor_elements import NOBLE_GASES
from equizoo.data.doctor_equivalence import REACH, fingerprint
from equizoo.data.doctor_findings import Finding, Verdict, named
from equizoo.data.readers import Dataset
from equizoo.data.reference_energies import Composition
from equizoo.neighbors import neighbor_list
from equizoo.structure import Structure

_TOO_CLOSE = 0.5  # of the sum of covalent radii; the shortest chemical bonds are at 0.9
_TOO_FAR = 1.6  # the nearest neighbour of most atoms; in bohr taken for Å it is at 1.9
_NET = 0.01  # of the root of the sum of squares: relative noise of the force components
_MISPLACED = 0.1  # net torque likewise: forces of another orientation
_NOISE = 1e-3  # [eV/Å]


class FrameFacts(NamedTuple):
    """What is measured on one frame, in one pass over its neighbours."""

    closest: float  # smallest distance / sum of covalent radii; inf for one atom
    nearest: float  # median over atoms of that ratio for their nearest neighbour
    lone_atoms: int  # without a neighbour within the cutoff
    fragments: int  # connected within the cutoff
    fingerprint: Float[np.ndarray, " features"]  # the same for symmetry-equivalent frames
    max_force: float  # [eV/Å] nan without forces
    net_force: float  # [eV/Å] length of the sum
    net_force_ratio: float  # over the root of the sum of squares
    net_torque_ratio: float  # aperiodic only: about the centre, likewise; else nan
    zero_forces: Bool[np.ndarray, " nodes"]  # exactly zero
    unexplained_zeros: int  # of these, atoms whose surroundings have no symmetry that asks for it


def measure(structure: Structure, cutoff: float) -> FrameFacts:
    """The facts of one frame, with its neighbours within ``cutoff`` [Å] (at least 5 Å)."""
    reach = max(cutoff, REACH)
    senders, receivers, shifts = neighbor_list(
        structure.positions, structure.cell, structure.pbc, reach
    )
    vectors = structure.positions[receivers] - structure.positions[senders]
    vectors += shifts @ structure.cell
    lengths = np.linalg.norm(vectors, axis=1)
    nodes, numbers = structure.num_nodes, structure.atomic_numbers
    radii = covalent_radii[numbers]
    nearest = np.full(nodes, np.inf)
    if len(lengths):
        present, starts = np.unique(receivers, return_index=True)
        ratios = lengths / (radii[senders] + radii[receivers])
        nearest[present] = np.minimum.reduceat(ratios, starts)
    within = lengths < cutoff
    links = coo_array(
        (np.ones(within.sum(), np.int8), (receivers[within], senders[within])), (nodes, nodes)
    )
    bonded = np.bincount(receivers[within], minlength=nodes) > 0
    finite = nearest[np.isfinite(nearest)]
    zero = np.zeros(nodes, bool)
    forces = structure.forces
    unexplained = 0
    if forces is not None:
        zero = (forces == 0).all(axis=1)
        if zero.any():
            pulled = _asymmetric(vectors, lengths, senders, receivers, numbers)
            unexplained = int((zero & pulled).sum())
    return FrameFacts(
        closest=float(nearest.min()),
        nearest=float(np.median(finite)) if len(finite) else np.inf,
        lone_atoms=0 if nodes == 1 else int((~bonded).sum()),
        fragments=int(connected_components(links, directed=False)[0]),
        fingerprint=fingerprint(lengths, senders, receivers, numbers),
        zero_forces=zero,
        unexplained_zeros=unexplained,
        **_balance(structure),
    )


def _balance(structure: Structure) -> dict[str, float]:
    forces = structure.forces
    if forces is None:
        missing = ("max_force", "net_force", "net_force_ratio", "net_torque_ratio")
        return dict.fromkeys(missing, np.nan)
    # forces of a relaxed or symmetric frame are noise, of which a ratio says nothing
    size = max(np.sqrt(np.sum(forces**2)), _NOISE * np.sqrt(len(forces)))
    net = float(np.linalg.norm(forces.sum(axis=0)))
    arms = structure.positions - structure.positions.mean(axis=0)
    torque = np.linalg.norm(np.cross(arms, forces).sum(axis=0))
    leverage = np.sqrt(np.sum(arms**2 * np.sum(forces**2, axis=1, keepdims=True)))
    leverage = max(leverage, _NOISE * np.sqrt(np.sum(arms**2)))
    return {
        "max_force": float(np.linalg.norm(forces, axis=1).max()),
        "net_force": net,
        "net_force_ratio": float(net / size),
        "net_torque_ratio": (
            np.nan if any(structure.pbc) or not leverage > 0 else float(torque / leverage)
        ),
    }


def _asymmetric(
    vectors: Float[np.ndarray, "edges 3"],  # [Å]
    lengths: Float[np.ndarray, " edges"],  # [Å]
    senders: Int[np.ndarray, " edges"],
    receivers: Int[np.ndarray, " edges"],
    numbers: Int[np.ndarray, " nodes"],
) -> Bool[np.ndarray, " nodes"]:
    """Atoms with a vector in their surroundings: no symmetry says that their force is zero."""
    weights = numbers[senders] * np.exp(-lengths)
    sums = np.stack(
        [
            np.bincount(receivers, weights * vectors[:, k] / lengths, minlength=len(numbers))
            for k in range(3)
        ],
        axis=1,
    )
    total = np.bincount(receivers, weights, minlength=len(numbers))
    return np.linalg.norm(sums, axis=1) > 2e-3 * np.maximum(total, 1e-12)


# ---- checks


def distances(dataset: Dataset, facts: Sequence[FrameFacts], cutoff: float) -> Iterator[Finding]:
    """Atoms too close, too far apart for Å, alone, or in fragments."""
    structures = dataset.structures
    several = np.array([s.num_nodes > 1 for s in structures])
    closest = np.array([f.closest for f in facts])
    nearest = np.array([f.nearest for f in facts])
    close = np.flatnonzero(closest < _TOO_CLOSE)
    check = "distances"
    if len(close) > 0.5 * several.sum():
        factor = float(np.median(nearest[several]))
        unit = "nm: multiply positions and cell by 10" if factor < 0.2 else "another unit than Å"
        yield Finding(
            check,
            Verdict.ERROR,
            f"atoms closer than half the sum of their covalent radii in {len(close)} of "
            f"{len(structures)} frames; nearest neighbours are at {factor:.2f} of it",
            len(close),
            named(structures, close),
            f"Positions seem to be in {unit}.",
        )
    elif len(close):
        yield Finding(
            check,
            Verdict.WARNING,
            f"atoms closer than half the sum of their covalent radii (down to "
            f"{closest.min():.2f} of it)",
            len(close),
            named(structures, close[np.argsort(closest[close])]),
            "Leave these frames out, unless repulsion at such distances is to be learnt.",
        )
    usual = np.array(
        [s.num_nodes > 2 and NOBLE_GASES.isdisjoint(s.atomic_numbers.tolist()) for s in structures]
    )
    far = np.flatnonzero(usual & (nearest > _TOO_FAR))
    if len(far) >= 3 and len(far) > 0.8 * usual.sum():
        yield Finding(
            check,
            Verdict.ERROR,
            f"nearest neighbours are at {np.median(nearest[far]):.2f} of the sum of covalent radii "
            "(usual: 0.9 to 1.3)",
            len(far),
            named(structures, far),
            "Positions seem to be in bohr: multiply positions and cell by 0.529177.",
        )
    within = f"within {cutoff:g} Å"
    for frames, verdict, message, fix in (
        (
            np.flatnonzero([f.lone_atoms > 0 for f in facts]),
            Verdict.WARNING,
            f"frames with atoms that have no neighbour {within}",
            "A model with this cutoff gives such atoms no force; leave them out if that is wrong.",
        ),
        (
            np.flatnonzero([f.fragments > 1 for f in facts]),
            Verdict.NOTE,
            f"frames in fragments that do not see each other {within}",
            "Their interaction is not learnt; is a molecule cut at a cell's border?",
        ),
    ):
        if len(frames):
            yield Finding(check, verdict, message, len(frames), named(structures, frames), fix)


def balance(dataset: Dataset, facts: Sequence[FrameFacts]) -> Iterator[Finding]:
    """Net forces, and net torques of aperiodic frames, which no conservative model can have."""
    structures = dataset.structures
    several = np.array([s.num_nodes > 1 for s in structures])
    force = np.array([f.net_force_ratio for f in facts])
    torque = np.array([f.net_torque_ratio for f in facts])
    unbalanced = np.flatnonzero(several & (force > _NET))
    if len(unbalanced):
        worst = unbalanced[np.argsort(-force[unbalanced])]
        largest = max(facts[i].net_force for i in unbalanced.tolist())
        yield Finding(
            "net force",
            Verdict.WARNING,
            f"forces do not add up to zero: up to {largest:.3g} eV/Å, typically "
            f"{100 * np.median(force[unbalanced]):.1f} % noise on each component",
            len(unbalanced),
            named(structures, worst),
            "Loose convergence, an external field, or forces of some atoms missing; a model "
            "cannot fit this part.",
        )
    known = several & np.isfinite(torque)
    turned = np.flatnonzero(known & (torque > _MISPLACED) & ~(force > _MISPLACED))
    if len(turned) >= 5 and len(turned) > 0.5 * known.sum():
        yield Finding(
            "net torque",
            Verdict.ERROR,
            f"forces turn free molecules (median net torque "
            f"{100 * np.median(torque[turned]):.0f} % of the largest possible)",
            len(turned),
            named(structures, turned),
            "Forces belong to another orientation or atom order than the positions, such as a "
            "program's standard orientation.",
        )
    elif len(tilted := np.flatnonzero(known & (torque > 2 * _NET))):
        yield Finding(
            "net torque",
            Verdict.WARNING,
            f"forces turn free molecules (net torque up to {100 * torque[tilted].max():.0f} % of "
            "the largest possible)",
            len(tilted),
            named(structures, tilted[np.argsort(-torque[tilted])]),
            "Loose convergence, an external field, or forces in another orientation.",
        )


def outliers(dataset: Dataset, facts: Sequence[FrameFacts]) -> Iterator[Finding]:
    """Energies far from what compositions explain, and forces far above the others'."""
    structures = dataset.structures
    labelled = np.flatnonzero([s.energy is not None for s in structures])
    if len(labelled) >= 10:
        chosen = [structures[i] for i in labelled.tolist()]
        residuals = energy_residuals(chosen)
        off = np.abs(residuals - np.median(residuals))
        spread = 1.4826 * np.median(off)
        wild = np.flatnonzero(off > max(20 * spread, 0.2))  # [eV/atom]
        if len(wild):
            worst = labelled[wild[np.argsort(-off[wild])]]
            yield Finding(
                "outliers",
                Verdict.WARNING,
                f"energies up to {off.max():.3g} eV/atom away from what their composition "
                f"explains, others typically {spread:.2g}",
                len(wild),
                named(structures, worst),
                "Failed calculations, another level of theory or state? Look, and leave them out.",
            )
    forces = np.array([f.max_force for f in facts])
    moving = forces[forces > 0]
    if len(moving) >= 10:
        usual = float(np.median(moving))
        spread = 1.4826 * np.median(np.abs(np.log10(moving / usual)))
        wild = np.flatnonzero(forces > max(usual * 10 ** max(1, 5 * spread), 20.0))  # [eV/Å]
        if len(wild):
            yield Finding(
                "outliers",
                Verdict.WARNING,
                f"forces up to {np.nanmax(forces):.3g} eV/Å, the largest of a frame typically "
                f"{usual:.2g}",
                len(wild),
                named(structures, wild[np.argsort(-forces[wild])]),
                "Squared errors are ruled by such frames: leave them out, or use Huber's loss.",
            )


def energy_residuals(structures: Sequence[Structure]) -> Float[np.ndarray, " structures"]:
    """Energies [eV/atom] less a fit on the compositions that leaves outliers aside."""
    energies = np.array([s.energy for s in structures])
    _, counts = Composition.of(structures)
    sizes = counts.sum(axis=1)
    inliers = np.ones(len(structures), bool)
    rows, values = counts / sizes[:, None], energies / sizes
    for _ in range(4):
        fit = np.linalg.lstsq(rows[inliers], values[inliers], rcond=None)[0]
        residuals = values - rows @ fit
        centre = np.median(residuals[inliers])
        spread = np.median(np.abs(residuals[inliers] - centre))
        inliers = np.abs(residuals - centre) <= 10 * spread + 1e-9
    return residuals
