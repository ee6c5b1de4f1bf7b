"""Base data that a model keeps seeing while it is fine-tuned, under a head of their own."""

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from equizoo.data.datasets import load_dataset
from equizoo.data.doctor_frames import measure
from equizoo.data.prepared import is_lazy
from equizoo.data.readers import Dataset
from equizoo.eval.potential import Potential
from equizoo.structure import Structure, require_same_reference, spread

HEADS = NEW, BASE = ("finetuned", "base")  # of a model trained so; the first answers
_CANDIDATES = 10_000  # frames among which the farthest are looked for


class LabelsFrom(enum.StrEnum):
    """Whose labels replayed frames have.

    ``model``: the base model's predictions, for frames of any origin. ``data``: their own, which
    must be at the base model's level of theory.
    """

    MODEL = "model"
    DATA = "data"


class Selection(enum.StrEnum):
    """Which of many frames are replayed.

    ``farthest``: one after the other, each that is most unlike all before it, by smooth sums over
    its pairs of atoms. ``random``: any.
    """

    FARTHEST = "farthest"
    RANDOM = "random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """Frames that hold a fine-tuned model to what it knew.

    The model gets two heads, both as the base model's: one learns the new data, the other goes on
    with these frames, whose level of theory may be another; what is below the heads serves both.
    Multi-head replay, after Batatia et al. 2024, https://arxiv.org/abs/2401.00096 (section on
    fine-tuning).
    """

    data: str  # what load_dataset takes
    count: int | None = None  # frames; None: all
    selection: Selection = Selection.FARTHEST
    labels: LabelsFrom = LabelsFrom.MODEL
    seed: int = 0

    def __post_init__(self):
        if self.count is not None and self.count < 1:
            raise ValueError(f"count is {self.count}, expected at least 1, or null for all frames.")

    def frames(self, base: Potential) -> Dataset:
        """The frames with their labels, for the second of :data:`HEADS`.

        Raises ``ValueError`` when there are fewer than asked for, when their own labels are not
        the base model's level of theory or energy reference, and for elements that it lacks.
        """
        return self._labelled(base, rest=None)

    def rest(self, base: Potential, most: int) -> Dataset:
        """At most so many of the frames that are not replayed, with labels as these have.

        Raises as :meth:`frames` does.
        """
        return self._labelled(base, rest=most)

    def _labelled(self, base: Potential, rest: int | None) -> Dataset:
        dataset = load_dataset(self.data, require=() if self.labels is LabelsFrom.MODEL else None)
        if self.labels is LabelsFrom.DATA:
            require_same_reference(base.energy_reference, dataset.energy_reference, "Replay")
            if dataset.level_of_theory != base.level_of_theory:
                raise ValueError(
                    f"{self.data} is {dataset.level_of_theory!r}, the base model is "
                    f"{base.level_of_theory!r}; replayed labels must be what it knew. Let the base "
                    "model label the frames: labels=model."
                )
        indices = self._chosen(dataset.structures)
        if rest is not None:
            left = np.setdiff1d(np.arange(len(dataset)), indices)
            indices = spread(left.tolist(), rest)
        chosen = [dataset.structures[i] for i in indices]
        if self.labels is LabelsFrom.MODEL and chosen:
            results = base.predict(chosen)
            chosen = [result.label(s) for s, result in zip(chosen, results, strict=True)]
        return dataclasses.replace(
            dataset,
            structures=tuple(dataclasses.replace(s, head=BASE) for s in chosen),
            energy_reference=base.energy_reference,
            level_of_theory=base.level_of_theory,
            statistics=None,
        )

    def _chosen(self, structures: Sequence[Structure]) -> list[int]:
        """Which frames are replayed."""
        if self.count is None:
            return list(range(len(structures)))
        if self.count > len(structures):
            raise ValueError(
                f"{self.data} has {len(structures)} frames, of which {self.count} are to be "
                "replayed; ask for fewer, or leave the number out for all."
            )
        order = np.random.default_rng(self.seed).permutation(len(structures))
        if self.selection is Selection.RANDOM:
            return order[: self.count].tolist()
        candidates = order[: max(_CANDIDATES, self.count)]
        features = np.stack([measure(structures[i], 5.0).fingerprint for i in candidates.tolist()])
        return candidates[farthest(features, self.count)].tolist()


def farthest(
    features: Float[np.ndarray, "frames features"], count: int
) -> Int[np.ndarray, " count"]:
    """Indices of frames, each the farthest from the nearest one before; the first is the one
    nearest to the mean. Distances are Euclidean, in units of each feature's standard deviation."""
    scaled = features - features.mean(axis=0)
    spread = scaled.std(axis=0)
    scaled = scaled / np.where(spread > 0, spread, 1.0)
    chosen = [int(np.argmin(np.sum(scaled**2, axis=1)))]
    nearest = np.full(len(scaled), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.sum((scaled - scaled[chosen[-1]]) ** 2, axis=1))
        nearest[chosen] = -np.inf  # equal frames may be all that is left
        chosen.append(int(np.argmax(nearest)))
    return np.array(chosen)


def two_headed(base: Potential, finetuned: Potential) -> Potential:
    """The base model with a copy of its head for each of :data:`HEADS`, with reference energies
    and level of theory of ``finetuned`` (the same model) for the first."""
    return Potential(
        base.model.with_copied_heads(HEADS),
        reference_energies={NEW: finetuned.reference_energies, BASE: base.reference_energies},
        energy_reference=base.energy_reference,
        level_of_theory={NEW: finetuned.level_of_theory, BASE: base.level_of_theory},
        name=finetuned.name,
    )


def nameless(dataset: Dataset) -> Dataset:
    """The data set without names of other models' heads, so that the head in use answers."""
    if is_lazy(dataset.structures) or all(s.head is None for s in dataset.structures):
        return dataset
    structures = tuple(dataclasses.replace(s, head=None) for s in dataset.structures)
    return dataclasses.replace(dataset, structures=structures)
