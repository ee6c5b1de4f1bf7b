"""Reference energies E0: one number per element, subtracted from labels and added to outputs.

All of it is float64 on the host. Where they come from is an object, :class:`ReferenceEnergies`.
"""

import abc
import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from jaxtyping import Float, Int

from equizoo.data.catalyst_references import read_linear_reference
from equizoo.data.readers import Dataset
from equizoo.data.statistics import Triangle
from equizoo.registry import UnknownName
from equizoo.structure import EnergyReference, Structure, require_same_reference, symbols

_FULL_RANK = (
    "Give isolated-atom energies (IsolatedAtoms, Given), take the base model's (FromModel, "
    "RefitFromModel), or accept the shortest solution, LeastSquares(minimum_norm=True), whose "
    "values mean nothing for other compositions."
)
_NO_ENERGY = "no structure has an energy to fit reference energies to; check the keys."
_ROUNDING = 1e-10  # singular values of reduced rows; those of counts are whole numbers' or zero
_REFIT_SAMPLE = 10_000  # structures of prepared data


class Composition(NamedTuple):
    """How many atoms of each element each structure has."""

    elements: tuple[int, ...]  # atomic numbers, sorted
    counts: Float[np.ndarray, "structures elements"]

    @classmethod
    def of(cls, structures: Sequence[Structure]) -> "Composition":
        tallies = [Counter(s.atomic_numbers.tolist()) for s in structures]
        elements = tuple(sorted(set().union(*tallies)))
        counts = np.array([[tally[z] for z in elements] for tally in tallies], dtype=np.float64)
        return cls(elements, counts.reshape(len(tallies), len(elements)))


def reference_energy(numbers: Int[np.ndarray, " nodes"], e0: Mapping[int, float]) -> float:  # [eV]
    """The sum of ``e0`` over the atoms; ``ValueError`` listing the elements that it lacks."""
    require_elements(e0, numbers.tolist(), "the structure")
    return float(sum(count * e0[z] for z, count in sorted(Counter(numbers.tolist()).items())))


def interaction_energy(structure: Structure, e0: Mapping[int, float]) -> float:  # [eV]
    """The energy label minus the reference energy; ``ValueError`` when there is no label."""
    if structure.energy is None:
        raise ValueError(f"Structure {structure.name or '(unnamed)'} has no energy to subtract E0.")
    return structure.energy - reference_energy(structure.atomic_numbers, e0)


def total_energy(
    interaction: float,  # [eV]
    numbers: Int[np.ndarray, " nodes"],
    e0: Mapping[int, float],
) -> float:  # [eV]
    """The inverse of :func:`interaction_energy`: ``interaction`` plus the reference energy."""
    return interaction + reference_energy(numbers, e0)


def fit_reference_energies(
    structures: Sequence[Structure], minimum_norm: bool = False
) -> dict[int, float]:  # [eV]
    """Energies per element that fit the energy labels best: least squares on the compositions.

    Structures without energy do not count. Raises ``ValueError`` when the compositions do not
    determine every element (one molecule, one stoichiometry), naming those elements, unless
    ``minimum_norm`` asks for the shortest of the solutions.
    """
    labelled, energies = _labelled(structures)
    return _fitted(Composition.of(labelled), energies, minimum_norm)


def fit_reduced(compositions: Triangle, minimum_norm: bool = False) -> dict[int, float]:  # [eV]
    """The same from the statistics of prepared data, without going over their frames."""
    if not len(compositions.rows):
        raise ValueError(_NO_ENERGY)
    composition = Composition(compositions.elements, compositions.counts)
    return _fitted(composition, compositions.energies, minimum_norm, _ROUNDING)


def _fitted(
    composition: Composition,
    energies: Float[np.ndarray, " structures"],
    minimum_norm: bool,
    tolerance: float | None = None,  # of singular values, relative to the largest
) -> dict[int, float]:  # [eV]
    elements, counts = composition
    rank = np.linalg.matrix_rank(counts, rtol=tolerance)
    if not minimum_norm and rank < len(elements):
        raise ValueError(_rank_message(elements, counts))
    solution = np.linalg.lstsq(counts, energies, rcond=tolerance)[0]
    return dict(zip(elements, solution.tolist(), strict=True))


def refit(
    base: Mapping[int, float],  # [eV]
    composition: Composition,
    residuals: Float[np.ndarray, " structures"],  # [eV] label minus prediction with ``base``
    free: Collection[int] = (),
) -> dict[int, float]:  # [eV]
    """``base`` moved by the smallest shifts per element that fit the residuals best.

    Defined for any data, a single molecule included, since the shifts are of minimum norm; the
    elements that do not occur stay as they are. This takes a model to another level of theory
    before its weights move. Shifts of ``free`` elements may be of any size and come first.

    Raises ``ValueError`` for elements that ``base`` lacks, and when compositions do not tell the
    free ones apart.
    """
    require_elements(base, composition.elements, "the data")
    if not np.isfinite(residuals).all():
        raise ValueError("refitting needs finite residuals; check the model's predictions.")
    elements, counts = composition
    new = np.array([z in free for z in elements])
    if np.linalg.matrix_rank(counts[:, new]) < new.sum():
        raise ValueError(
            f"the compositions do not tell apart the energies of {symbols(sorted(free))}, new to "
            f"the model. {_FULL_RANK}"
        )
    explained = np.linalg.qr(counts[:, new])[0]  # by free elements alone; the others get the rest
    unexplained = counts[:, ~new] - explained @ (explained.T @ counts[:, ~new])
    unexplained[np.abs(unexplained) < _ROUNDING * counts.max()] = 0
    shifts = np.zeros(len(elements))
    shifts[~new] = np.linalg.lstsq(unexplained, residuals, rcond=None)[0]
    rest = residuals - counts[:, ~new] @ shifts[~new]
    shifts[new] = np.linalg.lstsq(counts[:, new], rest, rcond=None)[0]
    moved = zip(elements, shifts.tolist(), strict=True)
    return dict(base) | {z: base[z] + shift for z, shift in moved}


def isolated_reference_energies(dataset: Dataset) -> dict[int, float]:  # [eV]
    """The isolated-atom energies of the data set's elements.

    Raises ``ValueError`` for elements without one, and when the data set's energies are not total.
    """
    require_same_reference(
        dataset.energy_reference, EnergyReference.TOTAL, "Subtracting isolated-atom energies"
    )
    hint = " Mark single-atom frames config_type=IsolatedAtom, pass isolated_atoms, or use Given."
    require_elements(dataset.isolated_atoms, dataset.elements, dataset.name or "the data", hint)
    return {z: dataset.isolated_atoms[z] for z in dataset.elements}


def require_elements(
    e0: Mapping[int, float], elements: Sequence[int], what: str, hint: str = ""
) -> None:
    """Raises ``ValueError`` listing the ``elements`` without a reference energy, if any."""
    if missing := sorted(set(elements) - set(e0)):
        raise ValueError(
            f"No reference energy for {symbols(missing)} in {what}; there are some for "
            f"{symbols(sorted(e0)) or 'no element'}.{hint}"
        )


@runtime_checkable
class BaseModel(Protocol):
    """The model that training starts from; an :class:`equizoo.eval.potential.Potential` is one."""

    @property
    def reference_energies(self) -> Mapping[int, float]: ...  # [eV] by atomic number

    @property
    def placeholders(self) -> frozenset[int]: ...  # elements whose reference energies mean nothing

    def predict(self, atoms: list[Structure], /) -> Sequence[Any]: ...  # each with an energy [eV]


class _Choices(Mapping[str, type]):
    """The subclasses of :class:`ReferenceEnergies` by name, for :mod:`equizoo.config`."""

    key = "name"

    def __iter__(self) -> Iterator[str]:
        return map(self.name_of, ReferenceEnergies.__subclasses__())

    def __len__(self) -> int:
        return len(ReferenceEnergies.__subclasses__())

    def __getitem__(self, name: str) -> type:
        for cls in ReferenceEnergies.__subclasses__():
            if self.name_of(cls) == name:
                return cls
        raise UnknownName("reference energies", name, self)

    def name_of(self, thing: Any) -> str:
        cls = thing if isinstance(thing, type) else type(thing)
        return re.sub(r"(?<!^)([A-Z])", r"_\1", cls.__name__).lower()


@dataclasses.dataclass(frozen=True)
class ReferenceEnergies(abc.ABC):
    """Where the reference energies come from; a field of a training configuration."""

    registry: ClassVar[_Choices] = _Choices()

    @abc.abstractmethod
    def resolve(self, dataset: Dataset, base: BaseModel | None = None) -> dict[int, float]:  # [eV]
        """Energies by atomic number for every element of the data, or else ``ValueError``."""


@dataclasses.dataclass(frozen=True)
class IsolatedAtoms(ReferenceEnergies):
    """The data set's own isolated atoms: with them a lone atom has the energy it should have."""

    def resolve(self, dataset, base=None):
        return isolated_reference_energies(dataset)


@dataclasses.dataclass(frozen=True)
class LeastSquares(ReferenceEnergies):
    """A fit of the energy labels on the compositions; see :func:`fit_reference_energies`."""

    minimum_norm: bool = False

    def resolve(self, dataset, base=None):
        if dataset.statistics is None:
            e0 = fit_reference_energies(dataset.structures, self.minimum_norm)
        else:
            e0 = fit_reduced(dataset.statistics.compositions, self.minimum_norm)
        require_elements(e0, dataset.elements, "structures without energy")
        return e0


@dataclasses.dataclass(frozen=True)
class Given(ReferenceEnergies):
    """These, by chemical symbol."""

    energies: dict[str, float]  # [eV]

    def __post_init__(self):
        if unknown := [symbol for symbol in self.energies if symbol not in chemical_symbols[1:]]:
            raise ValueError(f"{unknown} are no chemical symbols; expected e.g. {{'H': -13.6}}.")

    def resolve(self, dataset, base=None):
        known = {atomic_numbers[symbol]: energy for symbol, energy in self.energies.items()}
        require_elements(known, dataset.elements, dataset.name or "the data")
        return {z: known[z] for z in dataset.elements}


@dataclasses.dataclass(frozen=True)
class LinearReference(ReferenceEnergies):
    """Published coefficients, of total energies; see :func:`read_linear_reference`."""

    file: str  # such as oc22_linfit_coeffs.npz

    def resolve(self, dataset, base=None):
        require_same_reference(
            dataset.energy_reference, EnergyReference.TOTAL, "Subtracting a linear reference"
        )
        return read_linear_reference(Path(self.file).expanduser(), dataset.elements)


@dataclasses.dataclass(frozen=True)
class Zero(ReferenceEnergies):
    """0 eV for every element: for energies that are differences already, as of adsorption."""

    def resolve(self, dataset, base=None):
        if dataset.energy_reference == EnergyReference.TOTAL:
            raise ValueError(
                f"{dataset.name or 'the data'} has total energies, of thousands of eV, which a "
                "network cannot be left alone with; choose least_squares or isolated_atoms."
            )
        return dict.fromkeys(dataset.elements, 0.0)


@dataclasses.dataclass(frozen=True)
class FromModel(ReferenceEnergies):
    """The base model's, unchanged and for all its elements: data at the model's level of theory."""

    def resolve(self, dataset, base=None):
        if base is None:
            raise ValueError(
                "there is no base model to take reference energies from; choose another."
            )
        if base.placeholders:
            raise ValueError(
                f"{symbols(sorted(base.placeholders))} are new to the base model, which has no "
                "reference energies for them; choose refit_from_model, isolated_atoms or "
                "least_squares."
            )
        require_elements(base.reference_energies, dataset.elements, dataset.name or "the data")
        return dict(base.reference_energies)


@dataclasses.dataclass(frozen=True)
class RefitFromModel(ReferenceEnergies):
    """The base model's, moved to the data's level of theory; see :func:`refit`.

    Of data that lie on a disk, some 10,000 structures evenly spread over them are used.
    """

    def resolve(self, dataset, base=None):
        if base is None:
            raise ValueError("there is no base model to refit the energies of; choose another.")
        require_elements(base.reference_energies, dataset.elements, dataset.name or "the data")
        structures = dataset.structures
        if dataset.statistics is not None:
            structures = structures[:: -(-len(structures) // _REFIT_SAMPLE)]
        labelled, energies = _labelled(structures)
        predicted = np.array([result.energy for result in base.predict(labelled)])
        composition, residuals = Composition.of(labelled), energies - predicted
        return refit(base.reference_energies, composition, residuals, base.placeholders)


def _labelled(
    structures: Sequence[Structure],
) -> tuple[list[Structure], Float[np.ndarray, " labelled"]]:
    """The structures that have an energy, and those energies [eV]."""
    labelled = [s for s in structures if s.energy is not None]
    if not labelled:
        raise ValueError(_NO_ENERGY)
    return labelled, np.array([s.energy for s in labelled])


def undetermined_elements(structures: Sequence[Structure]) -> tuple[int, ...]:
    """The elements whose reference energies compositions alone do not determine, sorted."""
    elements, counts = Composition.of(structures)
    return tuple(_undetermined(elements, counts)[2])


def _undetermined(
    elements: tuple[int, ...], counts: Float[np.ndarray, "structures elements"]
) -> tuple[Float[np.ndarray, "distinct elements"], int, list[int]]:
    """Distinct compositions, their rank, and the elements that take part in their null space."""
    distinct = np.unique(counts, axis=0)
    _, singular, basis = np.linalg.svd(np.linalg.qr(distinct, mode="r"))
    rank = int((singular > singular[0] * 1e-10).sum())
    free = [
        z
        for z, in_null in zip(elements, np.abs(basis[rank:]).max(axis=0, initial=0.0), strict=True)
        if in_null > 1e-8
    ]
    return distinct, rank, free


def _rank_message(
    elements: tuple[int, ...], counts: Float[np.ndarray, "structures elements"]
) -> str:
    distinct, rank, free = _undetermined(elements, counts)
    named = ""
    if np.array_equal(distinct, np.abs(np.round(distinct))):  # else they have been reduced
        formulas = [
            "".join(
                f"{chemical_symbols[z]}{int(n)}" for z, n in zip(elements, row, strict=True) if n
            )
            for row in distinct[:5]
        ]
        more = f" and {len(distinct) - 5} more" if len(distinct) > 5 else ""
        named = f" {', '.join(formulas)}{more}"
    return (
        f"least squares cannot tell apart the reference energies of {symbols(free)}: "
        f"{len(elements)} elements, but the compositions{named} have rank {rank}. {_FULL_RANK}"
    )
