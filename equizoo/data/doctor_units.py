"""Units, signs and component orders of energies, forces and stresses, judged by each other."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from ase.units import Bohr, GPa, Hartree, kcal, kJ, mol
from jaxtyping import Float

from equizoo.data.doctor_elements import ENERGY_UNITS
from equizoo.data.doctor_findings import Finding, Verdict, named
from equizoo.data.doctor_pairs import ORDERS, Pairs, Slope, fit_slope, near_pairs
from equizoo.data.readers import Dataset
from equizoo.structure import Structure

_AGREES = 1.5  # slopes from 1/1.5 to 1.5 are anharmonicity
_NEAR_FACTOR = 1.15  # and to name a unit
_COMPONENTS = ("yz", "xz", "xy")

# The slope of energy differences over -F dx if one label is in another unit.
FORCE_SLOPES: Mapping[str, float] = {
    **{f"energies in {unit}": factor for unit, factor in ENERGY_UNITS.items()},
    "forces in hartree/bohr": Hartree / Bohr,
    "forces in hartree/Å": Hartree,
    "forces in rydberg/bohr": Hartree / 2 / Bohr,
    "forces in kcal/mol/Å": kcal / mol,
    "forces in kJ/mol/Å": kJ / mol,
    "forces in kJ/mol/nm": 0.1 * kJ / mol,
    "forces in meV/Å": 1e-3,
    "forces per bohr beside energies in the same unit (hartree/bohr and hartree, say)": 1 / Bohr,
    "forces per nm beside energies in the same unit (kJ/mol/nm and kJ/mol, say)": 0.1,
    "positions in bohr": Bohr,
    "positions in nm": 10.0,
}
# Likewise over V sigma : strain.
STRESS_SLOPES: Mapping[str, float] = {
    "GPa": GPa,
    "kbar": 0.1 * GPa,
    "bar": 1e-4 * GPa,
    "MPa": 1e-3 * GPa,
    "meV/Å^3": 1e-3,
    "hartree/bohr^3": Hartree / Bohr**3,
    "rydberg/bohr^3": Hartree / 2 / Bohr**3,
}


def forces(dataset: Dataset) -> Iterator[Finding]:
    """Energy differences between near frames against the work of forces: units and signs."""
    structures = dataset.structures
    check = "forces against energies"
    if not any(s.forces is not None and s.energy is not None for s in structures):
        yield Finding(check, Verdict.CANNOT_TELL, "no frame has both energy and forces")
        return
    pairs = near_pairs(structures)
    slope = force_slope(pairs)
    if pairs is None or not slope.consistent:
        yield _incoherent(structures, pairs, slope)
        return
    used = f"{slope.slope:.4g} (expected 1; {slope.num_pairs} pairs of near frames)"
    if 1 / _AGREES < slope.slope < _AGREES:
        message = f"energy differences over the work of forces: {used}"
        yield Finding(check, Verdict.FINE, message, slope.num_pairs)
        return
    verdict, fix = Verdict.ERROR, ""
    likely = _likely(slope, FORCE_SLOPES)
    per_atom = fit_slope(pairs.energy * pairs.num_nodes, pairs.forces_work, _by_distance(pairs))
    if 1 / _AGREES < -slope.slope < _AGREES:
        fix = "Forces have the wrong sign: they are gradients; multiply them by -1."
    elif per_atom.consistent and 1 / _AGREES < per_atom.slope < _AGREES:
        fix = "Energies are per atom: multiply them by the number of atoms."
        fix += f" (Or {' or '.join(likely)}.)" if likely else ""
    elif likely:
        sign = ", and forces have the wrong sign" if slope.slope < 0 else ""
        fix = f"Likely {' or '.join(likely)}{sign}; expected eV, eV/Å and Å."
    else:
        verdict = Verdict.WARNING
        fix = "No usual unit has this factor: frames are too far apart, or labels of two kinds?"
    message = f"energy differences are {used} times the work of forces"
    yield Finding(check, verdict, message, slope.num_pairs, _examples(structures, pairs), fix)


def force_slope(pairs: Pairs | None) -> Slope:
    """Energy differences over the work of forces, of the nearest pairs."""
    if pairs is None:
        return Slope(np.nan, np.inf, 0)
    return fit_slope(pairs.energy, pairs.forces_work, _by_distance(pairs))


def _incoherent(structures: Sequence[Structure], pairs: Pairs | None, slope: Slope) -> Finding:
    """No slope: for want of near frames, or because labels of very near frames are unrelated."""
    check = "forces against energies"
    if pairs is not None:
        clear = (pairs.displacement < 0.1) & (pairs.force_change < 0.5)
        clear &= np.abs(pairs.forces_work) > 5e-3  # [eV] above what rounding in a file can be
        near = pairs.of(clear)
        nearest = fit_slope(near.energy, near.forces_work, _by_distance(near), subsets=())
        if clear.sum() >= 20 and nearest.unexplained > 0.8:
            return Finding(
                check,
                Verdict.ERROR,
                "between frames that are nearly the same, energies do not change as forces say "
                f"({100 * nearest.unexplained:.0f} % of the differences unexplained)",
                int(clear.sum()),
                _examples(structures, near),
                "Energies and forces do not belong to the same frames, or to these positions.",
            )
    found = 0 if pairs is None else len(pairs.energy)
    message = (
        "no two frames of the same atoms in the same cell are near each other"
        if found < 8
        else f"the {found} nearest pairs of frames are too far apart "
        f"({100 * slope.unexplained:.0f} % of energy differences unexplained)"
    )
    return Finding(check, Verdict.CANNOT_TELL, f"units and sign of forces: {message}", found)


def stress(dataset: Dataset) -> Iterator[Finding]:
    """Energy differences between strained frames against the work of stress."""
    structures = dataset.structures
    if not any(s.stress is not None for s in structures):
        return
    check = "stress against energies"
    pairs = near_pairs(structures, strained=True)
    if pairs is None or len(pairs.energy) < 8:
        message = "units, sign and order of stress: no near frames that differ by a strain"
        yield Finding(check, Verdict.CANNOT_TELL, message)
        return
    factor = force_slope(near_pairs(structures))
    differences = pairs.energy - (factor.slope if factor.consistent else 1.0) * pairs.forces_work
    order = _by_distance(pairs)
    normal = np.trace(pairs.stress_work, axis1=1, axis2=2)
    fits = [fit_slope(differences, normal + pairs.sheared[:, k].sum(1), order) for k in range(6)]
    slope = fits[0]
    if not slope.consistent:
        best = int(np.argmin([fit.unexplained for fit in fits]))
        slope = fits[best] if fits[best].consistent else slope
    if not slope.consistent:
        virial = fit_slope(differences, (normal + pairs.sheared[:, 0].sum(1)) / pairs.volume, order)
        slope = virial if virial.consistent else slope
    if not slope.consistent:
        message = "units and sign of stress: strained frames are too far apart " + (
            f"({100 * slope.unexplained:.0f} % of energy differences unexplained)"
        )
        yield Finding(check, Verdict.CANNOT_TELL, message, len(pairs.energy))
        return
    yield from _judged(structures, pairs, differences, slope, factor)
    yield from _order(structures, pairs, differences, normal, slope)


def _judged(
    structures: Sequence[Structure],
    pairs: Pairs,
    differences: Float[np.ndarray, " pairs"],
    slope: Slope,
    factor: Slope,
) -> Iterator[Finding]:
    check = "stress against energies"
    used = f"{slope.slope:.4g} (expected 1; {slope.num_pairs} pairs of strained frames)"
    if 1 / _AGREES < slope.slope < _AGREES:
        message = f"energy differences over the work of stress: {used}"
        yield Finding(check, Verdict.FINE, message, slope.num_pairs)
        return
    wrong = f"energy differences are {used} times the work of stress"
    if factor.consistent and 1 / _AGREES < slope.slope / factor.slope < _AGREES:
        fix = "Forces give the same factor: it is the energies' unit, or their being per atom."
        yield Finding(check, Verdict.NOTE, wrong, slope.num_pairs, fix=fix)
        return
    sign = ", compression positive" if slope.slope < 0 else ""
    work = np.trace(pairs.stress_work, axis1=1, axis2=2) + pairs.sheared[:, 0].sum(1)
    virial = fit_slope(differences, work / pairs.volume, _by_distance(pairs))
    likely = _likely(slope, STRESS_SLOPES)
    verdict = Verdict.ERROR
    if 1 / _AGREES < -slope.slope < _AGREES:
        fix = "Stress has the wrong sign (tension is positive here): multiply it by -1."
    elif virial.consistent and 1 / _AGREES < abs(virial.slope) < _AGREES:
        minus = "-" if virial.slope < 0 else ""
        fix = f"The values are virials in eV: stress = {minus}virial / volume."
        fix += " Read them with LabelKeys(virial=...)." if virial.slope < 0 else ""
    elif likely:
        fix = f"Likely in {' or '.join(likely)}{sign}; expected eV/Å^3, tension positive."
    else:
        verdict = Verdict.WARNING
        fix = f"No usual unit has this factor{sign}: frames are too far apart, or stress is noisy."
    yield Finding(check, verdict, wrong, slope.num_pairs, _examples(structures, pairs), fix)


def _order(
    structures: Sequence[Structure],
    pairs: Pairs,
    differences: Float[np.ndarray, " pairs"],
    normal: Float[np.ndarray, " pairs"],
    slope: Slope,
) -> Iterator[Finding]:
    """Whether another order of yz, xz, xy explains sheared frames that this one does not."""
    rest = differences - slope.slope * normal
    right = np.abs(pairs.sheared).max(axis=1).sum(axis=1)  # the most that any order gives
    sheared = pairs.of(mask := np.abs(slope.slope) * right > 0.3 * np.abs(differences))
    rest = rest[mask]
    check = "order of stress components"
    if mask.sum() < 6 or not np.abs(rest).sum() > 0:
        message = "order of yz, xz, xy: no near frames that differ by a shear"
        yield Finding(check, Verdict.CANNOT_TELL, message, int(mask.sum()))
        return
    works = slope.slope * sheared.sheared.sum(axis=2)
    unexplained = np.abs(rest[:, None] - works).sum(axis=0) / np.abs(rest).sum()
    best = int(np.argmin(unexplained))
    if unexplained[0] < 0.5 or unexplained[best] > 0.5 * unexplained[0] or unexplained[best] > 0.4:
        known = unexplained[0] < 0.5
        told = f"explains sheared frames to {100 * (1 - unexplained[0]):.0f} %"
        message = f"yz, xz, xy {told}" if known else "no order of yz, xz, xy explains shear"
        verdict = Verdict.FINE if known else Verdict.CANNOT_TELL
        yield Finding(check, verdict, message, int(mask.sum()))
        return
    stands = [_COMPONENTS[ORDERS[best].index(k)] for k in range(3)]
    yield Finding(
        check,
        Verdict.ERROR,
        f"sheared frames are explained if what is read as yz, xz, xy is {', '.join(stands)}: "
        f"{100 * unexplained[best]:.0f} % instead of {100 * unexplained[0]:.0f} % unexplained",
        int(mask.sum()),
        _examples(structures, sheared),
        "Write six components as xx yy zz yz xz xy, or all nine. VASP prints xx yy zz xy yz zx.",
    )


def _by_distance(pairs: Pairs):
    return np.argsort(pairs.displacement, kind="stable")


def _examples(structures: Sequence[Structure], pairs: Pairs) -> tuple[str, ...]:
    return tuple(
        " and ".join(named(structures, (pairs.first[i], pairs.second[i])))
        for i in _by_distance(pairs)[:2]
    )


def _likely(slope: Slope, factors: Mapping[str, float]) -> list[str]:
    """Units whose factor is near the slope, the nearest first; small factors need more evidence."""
    if 1 / 3 < abs(slope.slope) < 3 and (slope.unexplained > 0.2 or slope.num_pairs < 12):
        return []
    off = {unit: abs(np.log(abs(slope.slope) / factor)) for unit, factor in factors.items()}
    return sorted((unit for unit in off if off[unit] < np.log(_NEAR_FACTOR)), key=off.__getitem__)
