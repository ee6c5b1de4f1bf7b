"""The doctor's look at a run's data, before anything is trained on them."""

import dataclasses
import enum
from collections.abc import Iterable, Sequence

import numpy as np

from equizoo.data.doctor_findings import Diagnosis, Finding
from equizoo.data.prepared import is_lazy, selection
from equizoo.data.readers import Dataset, LabelKeys
from equizoo.train.hosts import is_first


class DataChecks(enum.StrEnum):
    """What becomes of errors that the doctor finds in a run's data.

    ``refuse``: no training. ``warn``: they are printed, as warnings always are. ``off``: the data
    are not looked at.
    """

    REFUSE = "refuse"
    WARN = "warn"
    OFF = "off"


def _is_same(one: Dataset, other: Dataset) -> bool:
    """Whether both were read from the same place. Prepared data have their sources' names, which
    files in several folders share."""
    if one.name != other.name:
        return False
    first, second = (d.statistics and d.statistics.to_dict() for d in (one, other))
    return first == second


def check_data(
    dataset: Dataset,
    judged_by: Sequence[Dataset],
    checks: DataChecks,
    *,
    keys: LabelKeys | None = None,
    cutoff: float = 5.0,  # [Å]
    more: Iterable[Finding] = (),
) -> Diagnosis | None:
    """Prints what :func:`equizoo.data.doctor.examine` warns of; the whole diagnosis.

    A set that is ``judged_by`` itself (the same name and statistics) is not looked for in itself.
    Raises ``ValueError`` with all errors, unless ``checks`` says otherwise.
    """
    if checks is DataChecks.OFF:
        return None
    from rich.console import Console

    from equizoo.data.doctor import examine
    from equizoo.data.doctor_elements import REFERENCE_ENERGIES

    others = [other for other in judged_by if not _is_same(other, dataset)]
    diagnosis = examine(dataset, against=others, keys=keys or LabelKeys(), cutoff=cutoff)
    diagnosis = diagnosis.with_findings(more)
    # whether reference energies can be had is known by now
    shown = tuple(f for f in diagnosis.warnings if f.check != REFERENCE_ENERGIES)
    if diagnosis.errors:
        if checks is DataChecks.REFUSE:
            raise ValueError(
                f"{dataset.name} is not fit for training:\n"
                + "\n".join(f"- {finding}" for finding in diagnosis.errors)
                + '\nRepair the data (in a recipe, "without": ["TEST SET"] under "data" leaves out '
                "what a test set has too); or go on regardless, with --data-checks warn (in a "
                'recipe, "checks": "warn"). The whole picture: equizoo doctor.'
            )
        shown = (*diagnosis.errors, *shown)
    console = Console(stderr=True)
    for finding in shown:
        console.print(
            f"{finding.verdict.value}: {finding}", markup=False, highlight=False, soft_wrap=True
        )
    return diagnosis


def without(dataset: Dataset, others: Sequence[Dataset]) -> Dataset:
    """The data set without the frames that others have too, as they are or by symmetry.

    Prints how many they are. Raises ``ValueError`` for prepared data, whose frames are not all
    looked at, and when nothing is left.
    """
    from rich.console import Console

    from equizoo.data.doctor_duplicates import held_by

    if not others:
        return dataset
    for other in others:
        if is_lazy(dataset.structures) or is_lazy(other.structures):
            raise ValueError(
                f"Frames of {other.name} cannot be left out of {dataset.name}: prepared data are "
                "not held in memory. Leave them out of the files before 'equizoo prepare'."
            )
    console = Console(stderr=True, quiet=not is_first())
    shared = held_by(dataset, others)
    for other, found in zip(others, shared, strict=True):
        console.print(
            f"{len(found)} of {len(dataset)} frames of {dataset.name} are in {other.name} too, as "
            "they are or by symmetry: left out.",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    kept = np.setdiff1d(np.arange(len(dataset)), sorted(set().union(*shared)))
    if not len(kept):
        raise ValueError(f"All frames of {dataset.name} are left out; expected some to train on.")
    return dataclasses.replace(dataset, structures=selection(dataset.structures, kept))
