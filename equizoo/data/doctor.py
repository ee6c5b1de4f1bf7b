"""The doctor: what is wrong with a data set, found before training on it.

Checks are functions in :mod:`equizoo.data.doctor_labels`, ``doctor_units``, ``doctor_elements``,
``doctor_frames`` and ``doctor_duplicates``. Each works on all frames, in time that grows like their
number; pairs of near frames are looked for among at most 800 of the same atoms. Of prepared data,
which may be larger than memory, at most 10,000 frames are looked at.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from equizoo.data import (
    doctor_duplicates,
    doctor_elements,
    doctor_frames,
    doctor_labels,
    doctor_units,
)
from equizoo.data.doctor_findings import Diagnosis, Finding, Verdict
from equizoo.data.prepared import is_lazy
from equizoo.data.readers import Dataset, LabelKeys

_SAMPLE = 10_000  # frames of prepared data


def examine(
    dataset: Dataset,
    *,
    against: Sequence[Dataset] = (),
    keys: LabelKeys = LabelKeys(),  # noqa: B008 - frozen
    cutoff: float = 5.0,  # [Å] within which atoms see each other
) -> Diagnosis:
    """What is wrong with a data set, and what of it is in those that it is judged ``against``.

    ``keys`` are those it was read with. Read it with ``require=()`` and ``on_bad="skip"`` to be
    told of missing labels and of frames that cannot be read, rather than stopped by them.
    """
    whole, dataset = dataset, in_memory(dataset)
    facts = [doctor_frames.measure(structure, cutoff) for structure in dataset.structures]

    def findings() -> Iterator[Finding]:
        yield from _sampled(whole, dataset)
        yield from doctor_labels.unreadable(dataset)
        if not dataset.structures:
            lone = "; single atoms count as reference energies" if dataset.isolated_atoms else ""
            yield Finding("frames", Verdict.WARNING, f"there are no frames to look at{lone}")
            return
        yield from _or_fine("unread labels", doctor_labels.unread(dataset, keys))
        yield from _or_fine("zeroed labels", doctor_labels.zeros(dataset, facts))
        yield from doctor_units.forces(dataset)
        yield from doctor_units.stress(dataset)
        yield from _or_fine("energy scale", doctor_elements.energy_scale(dataset))
        yield from _or_fine("reference energies", doctor_elements.reference_energies(dataset))
        yield from _or_fine("distances", doctor_frames.distances(dataset, facts, cutoff))
        yield from _or_fine("net force and torque", doctor_frames.balance(dataset, facts))
        yield from _or_fine("outliers", doctor_frames.outliers(dataset, facts))
        yield from _or_fine("duplicates", doctor_duplicates.duplicates(dataset, facts))
        for other in map(in_memory, against):
            others = [doctor_frames.measure(structure, cutoff) for structure in other.structures]
            found = doctor_duplicates.leakage(dataset, facts, other, others)
            yield from _or_fine(f"leakage into {other.name}", found)

    empty = Diagnosis(whole.name, len(whole), ())
    return empty.with_findings(findings())


def in_memory(dataset: Dataset) -> Dataset:
    """The data set; of frames that lie on a disk, a sample spread evenly over them."""
    structures = dataset.structures
    if is_lazy(structures):
        structures = tuple(structures[:: -(-len(structures) // _SAMPLE)])
    return dataclasses.replace(dataset, structures=structures)


def _sampled(whole: Dataset, sample: Dataset) -> Iterator[Finding]:
    if len(sample) < len(whole):
        yield Finding(
            "sample",
            Verdict.NOTE,
            f"{len(sample):,} of {len(whole):,} frames were looked at, spread evenly",
            len(sample),
        )


def _or_fine(check: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings, or that there are none."""
    found = list(findings)
    yield from found or [Finding(check, Verdict.FINE, "nothing found")]
