"""What the data say about reference energies: elements told apart, seldom ones, energy scale."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from ase.data import chemical_symbols
from ase.units import Hartree, kcal, kJ, mol
from jaxtyping import Float, Int

from equizoo.data.doctor_findings import Finding, Verdict, named
from equizoo.data.readers import Dataset
from equizoo.data.reference_energies import Composition, undetermined_elements
from equizoo.structure import EnergyReference, Structure, symbols

REFERENCE_ENERGIES = "reference energies"  # the name of the check
_SELDOM = 5  # frames
NOBLE_GASES = frozenset({2, 10, 18, 36, 54, 86})
ENERGY_UNITS: Mapping[str, float] = {  # what an energy of 1 eV is in other units
    "hartree": 1 / Hartree,
    "rydberg": 2 / Hartree,
    "kcal/mol": mol / kcal,
    "kJ/mol": mol / kJ,
    "meV": 1e3,
}


def reference_energies(dataset: Dataset) -> Iterator[Finding]:
    """Whether reference energies can be fitted or are given, and which elements are seldom."""
    labelled = [s for s in dataset.structures if s.energy is not None]
    if not labelled:
        return
    if dataset.energy_reference == EnergyReference.TOTAL:
        given = [z for z in dataset.elements if z in dataset.isolated_atoms]
        free = undetermined_elements(labelled)
        if free:
            isolated = len(given) == len(dataset.elements)
            yield Finding(
                REFERENCE_ENERGIES,
                Verdict.NOTE if isolated else Verdict.WARNING,
                f"compositions do not tell apart the reference energies of {symbols(free)}, so a "
                "least-squares fit is refused" + ("; isolated atoms are given" if isolated else ""),
                len(free),
                fix=""
                if isolated
                else "Give isolated atoms (config_type=IsolatedAtom), or start from a model "
                "(refit_from_model).",
            )
        if given and len(given) < len(dataset.elements):
            lacking = [z for z in dataset.elements if z not in given]
            yield Finding(
                REFERENCE_ENERGIES,
                Verdict.WARNING,
                f"isolated atoms are given, but none of {symbols(lacking)}",
                len(lacking),
                fix="Add them, or take reference energies from elsewhere.",
            )
    _, counts = Composition.of(dataset.structures)
    frames = (counts > 0).sum(axis=0)
    seldom = [(z, int(n)) for z, n in zip(dataset.elements, frames, strict=True) if n < _SELDOM]
    if seldom and len(dataset) >= 10 * _SELDOM:
        listed = ", ".join(f"{chemical_symbols[z]} ({n})" for z, n in seldom)
        yield Finding(
            "seldom elements",
            Verdict.NOTE,
            f"elements in fewer than {_SELDOM} frames: {listed}",
            len(seldom),
            fix="What a model learns of them rests on these frames alone.",
        )


def energy_scale(dataset: Dataset) -> Iterator[Finding]:
    """Total energies of all electrons in another unit than eV; energies too small for totals.

    All-electron energies of atoms are known to about 1 %, and make up molecules' to less.
    """
    structures = dataset.structures
    labelled = [(i, s.energy) for i, s in enumerate(structures) if s.energy]
    if dataset.energy_reference != EnergyReference.TOTAL or len(labelled) < 3:
        return
    numbers = [structures[i].atomic_numbers for i, _ in labelled]
    atoms = np.array([all_electron_energies(z).sum() for z in numbers])
    energies = np.array([energy for _, energy in labelled])
    ratio = float(np.median(energies / atoms))
    frames = named(structures, (i for i, _ in labelled))
    for unit, factor in ENERGY_UNITS.items():
        if abs(ratio / factor - 1) < 0.03:
            yield Finding(
                "energy scale",
                Verdict.ERROR,
                f"energies are {ratio:.4g} times all electrons' energy in eV: they are in {unit}",
                len(labelled),
                frames,
                f"Divide energies by {factor:.8g}, and see whether forces are per {unit} as well.",
            )
    per_atom = np.median(np.abs(energies) / [len(z) for z in numbers])
    noble = frames_with([structures[i] for i, _ in labelled], NOBLE_GASES)
    if per_atom < 0.3 and not noble:  # metals' cohesion, the least of total energies, is above
        yield Finding(
            "energy scale",
            Verdict.WARNING,
            f"energies are {per_atom:.2g} eV/atom at the median: small for total energies",
            len(labelled),
            frames,
            "Differences (adsorption, formation, atomisation), or an energy per atom? Then say so "
            "with the energy reference, or multiply by the number of atoms.",
        )


def all_electron_energies(
    numbers: Int[np.ndarray, " nodes"],
) -> Float[np.ndarray, " nodes"]:  # [eV]
    r"""The energy of all electrons of neutral atoms, without relativity, to 2 % from boron on.

    Hydrogen's is exact, those of helium to beryllium are to 6 %.

    .. math:: E(Z) / E_h = -0.768745 Z^{7/3} + \tfrac12 Z^2 - 0.269900 Z^{5/3}

    Reference: Englert & Schwinger 1985, https://doi.org/10.1103/PhysRevA.32.26.
    """
    z = np.asarray(numbers, dtype=np.float64)
    energies = -0.768745 * z ** (7 / 3) + 0.5 * z**2 - 0.2699 * z ** (5 / 3)
    return Hartree * np.where(z == 1, -0.5, energies)


def frames_with(structures: Sequence[Structure], elements: Collection[int]) -> list[int]:
    """Indices of the frames that have one of these elements."""
    return [i for i, s in enumerate(structures) if set(s.atomic_numbers.tolist()) & {*elements}]
