"""Models side by side on the same structures, with what the differences are worth."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from equizoo.data.readers import Dataset
from equizoo.eval.evaluate import evaluate
from equizoo.eval.potential import Potential, Result
from equizoo.eval.speed import measure_speed
from equizoo.structure import Structure

_FACTS = ("architecture", "tensor_product", "parameters", "cutoff_A", "level_of_theory")
_ERRORS = (
    ("energy_mae_meV_per_atom", "energy MAE [meV/atom]"),
    ("energy_rmse_meV", "energy RMSE [meV]"),
    ("forces_mae_meV_per_A", "force MAE [meV/Å]"),
    ("forces_rmse_meV_per_A", "force RMSE [meV/Å]"),
    ("stress_mae_meV_per_A3", "stress MAE [meV/Å³]"),
    ("stress_rmse_meV_per_A3", "stress RMSE [meV/Å³]"),
)
_PAIRED = (("energy_meV_per_atom", "energy"), ("forces_meV_per_A", "force"))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Facts and errors by model, and differences to the first model by structure.

    A difference is that of mean absolute errors of single structures, averaged, with its standard
    error over structures; ``better`` is the share of structures on which the model beats the first.
    """

    models: tuple[str, ...]
    dataset: str
    dtype: str
    facts: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Mapping[str, Any]]
    differences: Mapping[str, Mapping[str, Mapping[str, float]]]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple[str, list[str]]]:
        """A table: labels, and a cell for each model."""
        table = []
        for key in (*_FACTS, "ms_per_atom"):
            cells = [_cell(self.facts[model].get(key, "")) for model in self.models]
            if any(cells):
                table.append((key.replace("_", " "), cells))
        for key, label in _ERRORS:
            values = [self.metrics[model].get(key) for model in self.models]
            if any(value is not None for value in values):
                table.append((label, ["" if v is None else f"{v:.3g}" for v in values]))
        for quantity, word in _PAIRED:
            cells = [""]
            for model in self.models[1:]:
                found = self.differences[model].get(quantity)
                cells.append("" if found is None else _difference(found))
            if any(cells):
                table.append((f"{word} MAE against {self.models[0]}", cells))
        return table


def compare(
    potentials: Mapping[str, Potential],  # by the name to show
    dataset: Dataset,
    *,
    dtype: str = "float32",
    speed: bool = False,
    progress: bool = False,
) -> Comparison:
    """The comparison of two or more potentials on one data set.

    With ``speed`` also what a batch of it costs each of them on this machine. Raises ``ValueError``
    for fewer than two, and as :func:`evaluate` does: for elements that one does not know, and for
    energies measured against something else than the data's.
    """
    if len(potentials) < 2:
        raise ValueError(
            f"A comparison of {', '.join(potentials) or 'nothing'}: expected two or more different "
            "models."
        )
    metrics: dict[str, dict[str, Any]] = {}
    errors = {name: _ByStructure([], []) for name in potentials}
    facts: dict[str, dict[str, Any]] = {}
    for name, potential in potentials.items():
        evaluation = evaluate(
            potential, dataset, dtype=dtype, progress=progress, observe=errors[name].add
        )
        metrics[name] = dict(evaluation.metrics)
        described = potential.describe()
        product = getattr(potential.config, "tensor_product", None)
        described["tensor_product"] = "" if product is None else product.registry.name_of(product)
        facts[name] = {key: described[key] for key in _FACTS}
        if speed:
            measured = measure_speed(potential, dataset.structures, dtype=dtype)
            facts[name]["ms_per_atom"] = measured.ms_per_atom
    first, *others = potentials
    notes = [
        f"{name} was trained at {facts[name]['level_of_theory']!r}, the data are "
        f"{dataset.level_of_theory!r}: total energies may differ by a constant per element."
        for name in potentials
        if facts[name]["level_of_theory"] != dataset.level_of_theory
    ]
    return Comparison(
        models=tuple(potentials),
        dataset=dataset.name,
        dtype=dtype,
        facts=facts,
        metrics=metrics,
        differences={name: _differences(errors[first], errors[name]) for name in others},
        notes=tuple(notes),
    )


class _ByStructure(NamedTuple):
    """Mean absolute errors of single structures, of those that have the label."""

    energy: list[float]  # [meV/atom]
    forces: list[float]  # [meV/Å] over free atoms, as in Metrics

    def add(self, structure: Structure, result: Result) -> None:
        if structure.energy is not None:
            error = abs(result.energy - structure.energy)
            self.energy.append(1e3 * error / structure.num_nodes)
        if structure.forces is not None and structure.free.any():
            errors = np.abs(result.forces - structure.forces)[structure.free]
            self.forces.append(1e3 * float(errors.mean(dtype=np.float64)))


def _differences(one: _ByStructure, other: _ByStructure) -> dict[str, Any]:
    pairs = zip(_PAIRED, one, other, strict=True)
    return {key: _paired(np.array(a), np.array(b)) for (key, _), a, b in pairs if a}


def _paired(
    one: Float[np.ndarray, " structures"], other: Float[np.ndarray, " structures"]
) -> dict[str, float]:
    difference = other - one
    count = len(difference)
    spread = float(difference.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
    return {
        "difference": float(difference.mean()),
        "standard_error": spread,
        "better": float(np.mean(other < one)),
    }


def _difference(found: Mapping[str, float]) -> str:
    return (
        f"{found['difference']:+.3g} ± {found['standard_error']:.2g}, "
        f"better on {100 * found['better']:.0f} %"
    )


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
