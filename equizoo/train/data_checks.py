"""The doctor's look at a run's data, before anything is trained on them."""

import enum
from collections.abc import Iterable, Sequence

from equizoo.data.doctor_findings import Diagnosis, Finding
from equizoo.data.readers import Dataset, LabelKeys


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
                + "\nRepair the data; or go on regardless, with --data-checks warn (in a recipe, "
                '"checks": "warn" under "data"). The whole picture: equizoo doctor.'
            )
        shown = (*diagnosis.errors, *shown)
    console = Console(stderr=True)
    for finding in shown:
        console.print(
            f"{finding.verdict.value}: {finding}", markup=False, highlight=False, soft_wrap=True
        )
    return diagnosis
