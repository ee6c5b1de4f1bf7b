"""The leaderboards of OC20 and OC22: splits, arrays, official sizes, and where data of each lie."""

import dataclasses
import enum
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from equizoo.data.catalyst import open_catalyst
from equizoo.data.catalyst_frames import CatalystSource
from equizoo.registry import UnknownName
from equizoo.structure import EnergyReference

Part = Literal["test", "val"]


class Layout(enum.StrEnum):
    """How a file is laid out, where the two known servers differ.

    ``space``: after the documentation of the Space that took over in 2026; frames in the order of
    the data, forces of all atoms. ``evalai``: what fairchem 1.x wrote for EvalAI; frames in the
    order of their ids as text, forces of free atoms only.
    """

    SPACE = "space"
    EVALAI = "evalai"


class Kind(enum.StrEnum):
    """Structure to energy and forces; initial structure to relaxed energy, or structure."""

    S2EF = "s2ef"
    IS2RE = "is2re"
    IS2RS = "is2rs"

    @property
    def vectors(self) -> str | None:
        """The name of the array of vectors per atom, if there is one."""
        return {"s2ef": "forces", "is2rs": "pos"}.get(self.value)

    @property
    def has_energy(self) -> bool:
        return self is not Kind.IS2RS


@dataclasses.dataclass(frozen=True)
class Task:
    """One leaderboard: what a file for it must hold."""

    name: str
    kind: Kind
    splits: tuple[str, ...]
    energy_reference: EnergyReference  # of the energies in the file
    counts: Mapping[Part, Mapping[str, int]]  # systems of every split
    layout: Layout = Layout.SPACE  # of its evaluator, where there is one

    def arrays(self, split: str) -> tuple[str, ...]:
        """The names of the arrays of one split."""
        vectors = self.kind.vectors
        fields = ["ids"] + ["energy"] * self.kind.has_energy
        fields += [vectors, "chunk_idx"] if vectors else []
        return tuple(f"{split}_{field}" for field in fields)


_OC20 = ("id", "ood_ads", "ood_cat", "ood_both")
_OC22 = ("id", "ood")


def _counts(splits: tuple[str, ...], test: tuple[int, ...], val: tuple[int, ...]):
    return {
        "test": dict(zip(splits, test, strict=True)),
        "val": dict(zip(splits, val, strict=True)),
    }


# fairchem's documentation of OC20 and OC22; the card of nimashoghi/oc22 for OC22's S2EF.
_OC20_S2EF = _counts(_OC20, (999736, 999859, 999826, 999973), (999866, 999838, 999809, 999944))
_OC20_INITIAL = _counts(_OC20, (24948, 24930, 24965, 24985), (24943, 24961, 24963, 24987))
_OC22_S2EF = _counts(_OC22, (398377, 385438), (394727, 450669))
_OC22_INITIAL = _counts(_OC22, (2624, 2650), (2624, 2780))

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("oc20-s2ef", Kind.S2EF, _OC20, EnergyReference.ADSORPTION, _OC20_S2EF),
        Task("oc20-is2re", Kind.IS2RE, _OC20, EnergyReference.ADSORPTION, _OC20_INITIAL),
        Task("oc20-is2rs", Kind.IS2RS, _OC20, EnergyReference.ADSORPTION, _OC20_INITIAL),
        Task("oc22-s2ef", Kind.S2EF, _OC22, EnergyReference.TOTAL, _OC22_S2EF, Layout.EVALAI),
        Task("oc22-is2re", Kind.IS2RE, _OC22, EnergyReference.TOTAL, _OC22_INITIAL, Layout.EVALAI),
        Task("oc22-is2rs", Kind.IS2RS, _OC22, EnergyReference.TOTAL, _OC22_INITIAL, Layout.EVALAI),
    )
}


def find_task(name: str) -> Task:
    """The task of that name; ``ValueError`` with the nearest names for another."""
    if name not in TASKS:
        raise UnknownName("leaderboard", name, TASKS)
    return TASKS[name]


def read_counts(path: Path, task: Task) -> dict[str, int]:
    """Systems of every split from a JSON file ``{"id": 10, ...}``; ``ValueError`` for others."""
    counts = json.loads(path.read_text())
    whole = isinstance(counts, dict) and all(type(n) is int and n > 0 for n in counts.values())
    if not whole or set(counts) != set(task.splits):
        raise ValueError(
            f"{path} holds {str(counts)[:80]}; expected a number of systems for each of "
            f"{', '.join(task.splits)}."
        )
    return {split: counts[split] for split in task.splits}


def open_splits(
    task: Task,
    folder: str | os.PathLike,
    part: Part,
    counts: Mapping[str, int],
    energy_reference: EnergyReference | None = None,
) -> dict[str, CatalystSource]:
    """The data of every split: ``<part>_<split>`` or ``<split>`` in ``folder``, as released.

    ``energy_reference`` is that of the data, see :func:`equizoo.data.open_catalyst`. Raises
    ``ValueError`` for missing splits, and for one whose size is not that in ``counts``.
    """
    folder = Path(folder).expanduser()
    sources: dict[str, CatalystSource] = {}
    for split in task.splits:
        candidates = [folder / f"{part}_{split}", folder / split]
        found = [path for path in candidates if path.is_dir()]
        if not found:
            raise ValueError(
                f"{folder} has no folder {candidates[0].name} or {candidates[1].name}; expected "
                f"one for each split of {task.name}: {', '.join(task.splits)}."
            )
        sources[split] = open_catalyst(found[0], energy_reference)
        if len(sources[split]) != counts[split]:
            raise ValueError(
                f"{found[0]} has {len(sources[split])} systems, expected {counts[split]} for "
                f"{task.name} {part} {split}. Complete the download, or give the sizes of another "
                "arrangement (--counts FILE)."
            )
    return sources
