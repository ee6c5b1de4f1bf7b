"""Errors of predictions over a data set, summed in float64, with units in their names."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from ase.data import chemical_symbols
from ase.units import GPa
from jaxtyping import Float

from equizoo.eval.potential import Result
from equizoo.structure import EnergyReference, Structure, require_same_reference

_UNITS = (  # quantity, what its errors are called, unit, factor from eV and Å
    ("energy", "energy", "meV", 1e3),
    ("energy_per_atom", "energy", "meV_per_atom", 1e3),
    ("forces", "forces", "meV_per_A", 1e3),
    ("stress", "stress", "meV_per_A3", 1e3),
    ("stress", "stress", "GPa", 1 / GPa),
)


@dataclasses.dataclass
class MeanErrors:
    """Mean absolute and root mean square errors of one quantity, from running sums."""

    count: int | float = 0  # components
    absolute: float = 0.0  # sum of absolute errors
    squares: float = 0.0  # sum of squared errors

    def add(self, errors: Float[np.ndarray, "..."]) -> None:
        """Takes in one error per component."""
        self.count += errors.size
        self.absolute += float(np.abs(errors).sum(dtype=np.float64))
        self.squares += float(np.square(errors).sum(dtype=np.float64))

    @property
    def mae(self) -> float:
        return self.absolute / self.count

    @property
    def rmse(self) -> float:
        return float(np.sqrt(self.squares / self.count))


def error_entries(errors: Mapping[str, MeanErrors]) -> dict[str, float]:
    """Both kinds of error under keys that end in the unit, such as ``forces_rmse_meV_per_A``.

    ``errors`` [eV, Å] are those of ``energy``, ``energy_per_atom``, ``forces``, ``stress``, or some
    of them; a quantity without any label has no entry.
    """
    return {
        f"{name}_{kind}_{unit}": factor * getattr(errors[quantity], kind)
        for quantity, name, unit, factor in _UNITS
        if quantity in errors and errors[quantity].count
        for kind in ("mae", "rmse")
    }


class Metrics:
    """Errors of energy, forces and stress over the labels that are there.

    A label that is absent counts nowhere, and an error without any label has no entry in
    :meth:`summary`. Every structure weighs the same in energies, every component the same in
    forces and stress (all nine of a tensor). Forces on atoms that a structure states to be held
    fixed (``info["fixed"]``) do not count, and their number is told. Raises ``ValueError`` when
    model and data measure energies against different references.
    """

    def __init__(self, model_reference: EnergyReference, data_reference: EnergyReference):
        require_same_reference(model_reference, data_reference, "Comparing model and data")
        self.num_structures = self.num_atoms = self.num_stresses_without_prediction = 0
        self.num_fixed_atoms = 0
        self._errors = {quantity: MeanErrors() for quantity, *_ in _UNITS}
        self._forces_of: dict[int, MeanErrors] = {}

    def add(self, structure: Structure, result: Result) -> None:
        """Takes in the errors of one structure."""
        self.num_structures += 1
        self.num_atoms += structure.num_nodes
        if structure.energy is not None:
            error = np.array([result.energy - structure.energy])
            self._errors["energy"].add(error)
            self._errors["energy_per_atom"].add(error / structure.num_nodes)
        if structure.forces is not None:
            free = structure.free
            self.num_fixed_atoms += int(np.sum(~free))
            errors = (result.forces - structure.forces)[free]
            numbers = structure.atomic_numbers[free]
            self._errors["forces"].add(errors)
            for z in np.unique(numbers).tolist():
                self._forces_of.setdefault(z, MeanErrors()).add(errors[numbers == z])
        if structure.stress is not None:
            if result.stress is None:
                self.num_stresses_without_prediction += 1
            else:
                self._errors["stress"].add(result.stress - structure.stress)

    def summary(self) -> dict[str, float | int | dict[str, float]]:
        """All errors and counts; keys end in the unit."""
        by_element: dict[str, dict[str, float]] = {}
        for z, of_element in sorted(self._forces_of.items()):
            for key, value in error_entries({"forces": of_element}).items():
                by_element.setdefault(f"{key}_by_element", {})[chemical_symbols[z]] = value
        return {
            **error_entries(self._errors),
            **by_element,
            "num_structures": self.num_structures,
            "num_atoms": self.num_atoms,
            "num_fixed_atoms": self.num_fixed_atoms,
            "num_energies": self._errors["energy"].count,
            "num_force_components": self._errors["forces"].count,
            "num_stress_components": self._errors["stress"].count,
            "num_stresses_without_prediction": self.num_stresses_without_prediction,
        }
