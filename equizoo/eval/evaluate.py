"""A potential against the labels of a data set."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from equizoo.data.readers import Dataset
from equizoo.eval.metrics import Metrics
from equizoo.eval.potential import BATCH_NODES, Potential, Result
from equizoo.structure import Structure

PARITY_POINTS = 200_000  # of each quantity that parity plots have; of more a sample
SAMPLE = 32  # frames of a large data set whose errors are kept apart, to be computed again quickly


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Errors of one potential on one data set, and numbers behind them for parity plots.

    Errors are over all labels; of more than :data:`PARITY_POINTS` numbers a random sample is kept.
    """

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
    observe: Callable[[Structure, Result], None] | None = None,
) -> Evaluation:
    """Errors over the labels that the data set has, from predictions in ``dtype``.

    What it holds in memory does not grow with the data set. ``observe`` is given every structure
    with its prediction, in order.

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
    points = {kind: PointSample(PARITY_POINTS) for kind in ("energy", "forces", "stress")}
    stream = potential.predict_stream(
        dataset.structures, dtype=dtype, batch_nodes=batch_nodes, progress=progress
    )
    for index, (structure, result) in enumerate(zip(dataset.structures, stream, strict=True)):
        metrics.add(structure, result)
        if index % every == 0:
            sample.add(structure, result)
        if observe is not None:
            observe(structure, result)
        for kind, kept in points.items():
            label, predicted = getattr(structure, kind), getattr(result, kind)
            if kind == "forces" and label is not None:
                label, predicted = label[structure.free], predicted[structure.free]
            if label is not None and predicted is not None:
                per = structure.num_nodes if kind == "energy" else 1
                kept.add(np.stack([np.ravel(label), np.ravel(predicted)], axis=1) / per)
    energy, forces, stress = (kept.points for kept in points.values())
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


class PointSample:
    """Points in the order they came; of more than ``most`` a uniform random sample of ``most``."""

    def __init__(self, most: int, seed: int = 0):
        self._most, self._random = most, np.random.default_rng(seed)
        self._held = 0
        self._points: list[np.ndarray] = []
        self._draws: list[np.ndarray] = []  # a number of each; the smallest stay

    def add(self, points: Float[np.ndarray, "points 2"]) -> None:
        self._points.append(points)
        self._draws.append(self._random.random(len(points)))
        self._held += len(points)
        if self._held > 2 * self._most:
            self._thin()

    @property
    def points(self) -> Float[np.ndarray, "points 2"]:
        self._thin()
        return self._points[0]

    def _thin(self) -> None:
        points = np.concatenate([np.zeros((0, 2)), *self._points])
        draws = np.concatenate([np.zeros(0), *self._draws])
        if len(points) > self._most:
            kept = np.sort(np.argpartition(draws, self._most)[: self._most])
            points, draws = points[kept], draws[kept]
        self._points, self._draws, self._held = [points], [draws], len(points)


def _has_labels(structure) -> bool:
    return any(x is not None for x in (structure.energy, structure.forces, structure.stress))
