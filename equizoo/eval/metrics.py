"""Errors of predictions over a data set, summed in float64, with units in their names."""

import numpy as np
from ase.data import chemical_symbols
from ase.units import GPa
from jaxtyping import Float

from equizoo.eval.potential import Result
from equizoo.structure import EnergyReference, Structure, require_same_reference


class MeanErrors:
    """Running mean absolute and root mean square errors; needs the memory of one structure."""

    def __init__(self):
        self.count, self._absolute, self._squares = 0, 0.0, 0.0

    def add(self, errors: Float[np.ndarray, "..."]) -> None:
        """Takes in one error per component."""
        self.count += errors.size
        self._absolute += float(np.abs(errors).sum(dtype=np.float64))
        self._squares += float(np.square(errors).sum(dtype=np.float64))

    @property
    def mae(self) -> float:
        return self._absolute / self.count

    @property
    def rmse(self) -> float:
        return float(np.sqrt(self._squares / self.count))


class Metrics:
    """Errors of energy, forces and stress over the labels that are there.

    A label that is absent counts nowhere, and an error without any label has no entry in
    :meth:`summary`. Every structure weighs the same in energies, every component the same in
    forces and stress (all nine of a tensor). Raises ``ValueError`` when model and data measure
    energies against different references.
    """

    def __init__(self, model_reference: EnergyReference, data_reference: EnergyReference):
        require_same_reference(model_reference, data_reference, "Comparing model and data")
        self.num_structures = self.num_atoms = self.num_stresses_without_prediction = 0
        self._energy, self._energy_per_atom = MeanErrors(), MeanErrors()
        self._forces, self._stress = MeanErrors(), MeanErrors()
        self._forces_of: dict[int, MeanErrors] = {}

    def add(self, structure: Structure, result: Result) -> None:
        """Takes in the errors of one structure."""
        self.num_structures += 1
        self.num_atoms += structure.num_nodes
        if structure.energy is not None:
            error = np.array([result.energy - structure.energy])
            self._energy.add(error)
            self._energy_per_atom.add(error / structure.num_nodes)
        if structure.forces is not None:
            errors = result.forces - structure.forces
            self._forces.add(errors)
            for z in np.unique(structure.atomic_numbers).tolist():
                of_element = self._forces_of.setdefault(z, MeanErrors())
                of_element.add(errors[structure.atomic_numbers == z])
        if structure.stress is not None:
            if result.stress is None:
                self.num_stresses_without_prediction += 1
            else:
                self._stress.add(result.stress - structure.stress)

    def summary(self) -> dict[str, float | int | dict[str, float]]:
        """All errors and counts; keys end in the unit."""
        milli = 1e3
        rows: dict[str, float | int | dict[str, float]] = {}
        for kind, errors, unit, factor in (
            ("energy", self._energy, "meV", milli),
            ("energy", self._energy_per_atom, "meV_per_atom", milli),
            ("forces", self._forces, "meV_per_A", milli),
            ("stress", self._stress, "meV_per_A3", milli),
            ("stress", self._stress, "GPa", 1 / GPa),
        ):
            if errors.count:
                rows[f"{kind}_mae_{unit}"] = factor * errors.mae
                rows[f"{kind}_rmse_{unit}"] = factor * errors.rmse
        if self._forces.count:
            of = {chemical_symbols[z]: errors for z, errors in sorted(self._forces_of.items())}
            rows["forces_mae_meV_per_A_by_element"] = {s: milli * e.mae for s, e in of.items()}
            rows["forces_rmse_meV_per_A_by_element"] = {s: milli * e.rmse for s, e in of.items()}
        return rows | {
            "num_structures": self.num_structures,
            "num_atoms": self.num_atoms,
            "num_energies": self._energy.count,
            "num_force_components": self._forces.count,
            "num_stress_components": self._stress.count,
            "num_stresses_without_prediction": self.num_stresses_without_prediction,
        }
