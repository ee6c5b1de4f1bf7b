r"""The metrics of OC20 and OC22, as their evaluator defines them, in float64.

All are micro-averages: sums over everything seen, divided once. Forces and positions count on free
atoms only. Systems that lack a label raise: a score over fewer systems than its name says is none.

Reference: Chanussot et al. 2021, https://doi.org/10.1021/acscatal.0c04525, and the evaluator of
fairchem 1.x, ``ocpmodels/modules/evaluator.py``.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from equizoo.data.catalyst_frames import CatalystFrame
from equizoo.eval.metrics import MeanErrors
from equizoo.structure import EnergyReference, require_same_reference

ENERGY_THRESHOLD = 0.02  # [eV] errors must be smaller
FORCE_THRESHOLD = 0.03  # [eV/Å] errors of all components must be smaller
DISTANCE_THRESHOLDS = np.arange(0.01, 0.5, 0.001)  # [Å] 490 of them
_COSINE_FLOOR = 1e-8  # [eV^2/Å^2] of the product of lengths


class _CatalystMetrics(abc.ABC):
    """Running sums over systems."""

    num_systems = 0

    @abc.abstractmethod
    def summary(self) -> dict[str, float | int]:
        """All metrics; keys end in the unit. Raises ``ValueError`` when nothing was added."""

    def _require_some(self) -> None:
        if not self.num_systems:
            raise ValueError("There is no metric of no systems; add predictions first.")


class _EnergyMetrics(_CatalystMetrics):
    """Metrics of energies; raises ``ValueError`` where those of model and data differ in kind."""

    def __init__(self, model_reference: EnergyReference):
        self._reference = EnergyReference(model_reference)
        self._energy = MeanErrors()
        self._within = 0

    def _see(self, frame: CatalystFrame) -> None:
        require_same_reference(self._reference, frame.energy_reference, "Comparing model and data")
        self.num_systems += 1


class S2EFMetrics(_EnergyMetrics):
    r"""Structure to energy and forces.

    - mean absolute error of energies, and of all components of forces on free atoms (also by axis);
    - mean over free atoms of :math:`F \cdot \hat F / \max(|F||\hat F|, 10^{-8})`: an atom without
      force counts as zero;
    - mean over free atoms of :math:`||\hat F| - |F||`;
    - EFwT: the fraction of systems with an energy error below 0.02 eV and every component of every
      free atom's force within 0.03 eV/Å, both strictly. A system without free atoms is judged by
      its energy.
    """

    def __init__(self, model_reference: EnergyReference):
        super().__init__(model_reference)
        self._axes = [MeanErrors() for _ in range(3)]
        self._magnitude = MeanErrors()
        self._cosines = 0.0

    def add(
        self,
        frame: CatalystFrame,
        energy: float,  # [eV]
        forces: Float[np.ndarray, "nodes 3"],  # [eV/Å]
    ) -> None:
        """Takes in one prediction; forces on fixed atoms do not matter."""
        label, label_forces = frame.structure.energy, frame.structure.forces
        if label is None or label_forces is None:
            raise ValueError(_lacks(frame, "energy and forces"))
        self._see(frame)
        energy_error = energy - label
        self._energy.add(np.array([energy_error]))
        predicted, expected = forces[frame.free], label_forces[frame.free]
        errors = predicted - expected
        for axis, sums in enumerate(self._axes):
            sums.add(errors[:, axis])
        lengths = np.linalg.norm(predicted, axis=1), np.linalg.norm(expected, axis=1)
        self._magnitude.add(lengths[0] - lengths[1])
        dots = np.sum(predicted * expected, axis=1)
        self._cosines += float(np.sum(dots / np.maximum(lengths[0] * lengths[1], _COSINE_FLOOR)))
        largest = np.abs(errors).max(initial=0.0)
        self._within += abs(energy_error) < ENERGY_THRESHOLD and largest < FORCE_THRESHOLD

    def summary(self) -> dict[str, float | int]:
        self._require_some()
        result: dict[str, float | int] = {
            "energy_mae_meV": 1e3 * self._energy.mae,
            "EFwT_percent": 100 * self._within / self.num_systems,
            "num_systems": self.num_systems,
            "num_free_atoms": int(self._magnitude.count),
        }
        if self._magnitude.count:
            total = sum(sums.absolute for sums in self._axes)
            atoms = self._magnitude.count
            result |= {"forces_mae_meV_per_A": 1e3 * total / (3 * atoms)}
            for axis, sums in zip("xyz", self._axes, strict=True):
                result[f"forces_{axis}_mae_meV_per_A"] = 1e3 * sums.mae
            result["forces_cosine"] = self._cosines / atoms
            result["forces_magnitude_mae_meV_per_A"] = 1e3 * self._magnitude.mae
        return result


class IS2REMetrics(_EnergyMetrics):
    """Initial structure to relaxed energy: mean absolute and squared errors, and EwT.

    EwT is the fraction of systems with an error below 0.02 eV, strictly.
    """

    def add(self, frame: CatalystFrame, energy: float) -> None:
        """Takes in one predicted relaxed energy [eV]."""
        if frame.relaxed_energy is None:
            raise ValueError(_lacks(frame, "relaxed energy"))
        self._see(frame)
        error = energy - frame.relaxed_energy
        self._energy.add(np.array([error]))
        self._within += abs(error) < ENERGY_THRESHOLD

    def summary(self) -> dict[str, float | int]:
        self._require_some()
        return {
            "energy_mae_meV": 1e3 * self._energy.mae,
            "energy_mse_eV2": self._energy.squares / self._energy.count,
            "EwT_percent": 100 * self._within / self.num_systems,
            "num_systems": self.num_systems,
        }


class IS2RSMetrics(_CatalystMetrics):
    r"""Initial structure to relaxed structure: ADwT.

    The distance of a system is the mean over its free atoms of the length of the
    :func:`minimum_image` of the displacement, 0 where there are none. ADwT is the mean over
    :data:`DISTANCE_THRESHOLDS` of the fraction of systems with a smaller distance, strictly.
    """

    def __init__(self) -> None:
        self._distances: list[float] = []

    def add(self, frame: CatalystFrame, positions: Float[np.ndarray, "nodes 3"]) -> None:
        """Takes in one predicted relaxed structure [Å]."""
        if frame.relaxed_positions is None:
            raise ValueError(_lacks(frame, "relaxed positions"))
        self.num_systems += 1
        apart = positions[frame.free] - frame.relaxed_positions[frame.free]
        lengths = np.linalg.norm(minimum_image(apart, frame.structure.cell), axis=1)
        self._distances.append(float(lengths.mean()) if len(lengths) else 0.0)

    def summary(self) -> dict[str, float | int]:
        self._require_some()
        distances = np.sort(np.array(self._distances))
        smaller = np.searchsorted(distances, DISTANCE_THRESHOLDS, side="left")
        return {
            "ADwT_percent": float(100 * np.mean(smaller / len(distances))),
            "distance_mean_A": float(distances.mean()),
            "num_systems": self.num_systems,
        }


def minimum_image(
    vectors: Float[np.ndarray, "n 3"],  # [Å]
    cell: Float[np.ndarray, "3 3"],  # [Å]
) -> Float[np.ndarray, "n 3"]:  # [Å]
    """The vectors with each fractional component brought into (-1/2, 1/2].

    That is how the metric is defined, along all three axes. In a skewed cell it is not always the
    shortest image.
    """
    fractional = np.linalg.solve(cell.T, vectors.T).T
    fractional = (fractional % 1.0) % 1.0  # once more: -1e-17 % 1.0 is 1.0
    fractional[fractional > 0.5] -= 1.0
    return fractional @ cell


def average_of_splits(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The unweighted mean over splits of every metric that all of them have, as leaderboards do."""
    every: Sequence[Mapping[str, Any]] = list(splits.values())
    if not every:
        raise ValueError("There is no average of no splits.")
    shared = [key for key in every[0] if all(key in metrics for metrics in every)]
    return {
        key: float(np.mean([metrics[key] for metrics in every]))
        for key in shared
        if not key.startswith("num_")
    }


def _lacks(frame: CatalystFrame, what: str) -> str:
    return (
        f"Structure {frame.structure.name} (sid {frame.sid}) has no {what} to compare with. Test "
        "splits have none: score a validation split, or write a leaderboard file instead."
    )
