"""A potential against the labels of a data set."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from equizoo.data.readers import Dataset
from equizoo.eval.metrics import Metrics
from equizoo.eval.potential import BATCH_NODES, Potential

SAMPLE = 32  # frames of a large data set whose errors are kept apart, to be computed again quickly


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Errors of one potential on one data set, and the numbers behind them for parity plots."""

    model: str
    dataset: str
    dtype: str
    metrics: Mapping[str, Any]
    left_out: Mapping[str, int]  # frames the reader left out, by reason
    energy_per_atom: Float[np.ndarray, "energies 2"]  # [eV] reference, predicted
    forces: Float[np.ndarray, "force_components 2"]  # [eV/Å] reference, predicted; of free atoms
    stress: Float[np.ndarray, "stress_components 2"]  # [eV/Å^3] reference, predicted
    # metrics of every so-many-th frame; empty for a small data set
    sample: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What belongs on a card: names, precision, errors and counts, JSON-able."""
        names = ("model", "dataset", "dtype")
        named = {name: getattr(self, name) for name in names}
        sampled = {"sample": dict(self.sample)} if self.sample else {}
        return named | {"metrics": dict(self.metrics)} | sampled | {"left_out": dict(self.left_out)}


def evaluate(
    potential: Potential,
    dataset: Dataset,
    *,
    dtype: str = "float32",
    batch_nodes: int = BATCH_NODES,
    progress: bool = False,
) -> Evaluation:
    """Errors over the labels that the data set has, from predictions in ``dtype``.

    Raises ``ValueError`` when model and data measure energies against different references, when
    no structure has any label, and as :meth:`Potential.predict` does.
    """
    metrics = Metrics(potential.energy_reference, dataset.energy_reference)
    if not any(_has_labels(structure) for structure in dataset.structures):
        raise ValueError(
            f"Data set {dataset.name or '(unnamed)'}: none of its {len(dataset)} structures has "
            "energy, forces or stress. Read it with the keys that its labels have (LabelKeys)."
        )
    every = math.ceil(len(dataset) / SAMPLE)
    sample = Metrics(potential.energy_reference, dataset.energy_reference)
    pairs: dict[str, list[np.ndarray]] = {"energy": [], "forces": [], "stress": []}
    stream = potential.predict_stream(
        dataset.structures, dtype=dtype, batch_nodes=batch_nodes, progress=progress
    )
    for index, (structure, result) in enumerate(zip(dataset.structures, stream, strict=True)):
        metrics.add(structure, result)
        if index % every == 0:
            sample.add(structure, result)
        for kind, values in pairs.items():
            label, predicted = getattr(structure, kind), getattr(result, kind)
            if kind == "forces" and label is not None:
                label, predicted = label[structure.free], predicted[structure.free]
            if label is not None and predicted is not None:
                per = structure.num_nodes if kind == "energy" else 1
                values.append(np.stack([np.ravel(label), np.ravel(predicted)], axis=1) / per)
    energy, forces, stress = (np.concatenate([np.zeros((0, 2)), *v]) for v in pairs.values())
    return Evaluation(
        model=potential.name,
        dataset=dataset.name,
        dtype=dtype,
        metrics=metrics.summary(),
        sample={"every": every, "metrics": sample.summary()} if every > 1 else {},
        left_out={reason: left.count for reason, left in dataset.report.left_out.items()},
        energy_per_atom=energy,
        forces=forces,
        stress=stress,
    )


def _has_labels(structure) -> bool:
    return any(x is not None for x in (structure.energy, structure.forces, structure.stress))
