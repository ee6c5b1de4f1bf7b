"""Predictions over the splits of a leaderboard, in parts that are complete files of their own.

A part is a range of systems of one split, predicted with batches whose shapes depend on nothing
else: whoever computes it, in whatever order, gets the same. So a run that was killed goes on with
the parts that are missing, and several processes or machines may share the work.
"""

import abc
import copy
import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from equizoo.data.catalyst_frames import CatalystFrame, CatalystSource
from equizoo.data.catalyst_references import reference_of
from equizoo.eval.leaderboard_tasks import Kind, Task
from equizoo.eval.potential import BATCH_NODES, Potential
from equizoo.eval.run_folder import open_run_folder, write_arrays
from equizoo.structure import EnergyReference, require_same_reference

_PLANNED = 64  # systems of every split that the shapes of batches are chosen for


class Outcome(NamedTuple):
    """What is predicted of one system."""

    energy: float  # [eV]
    vectors: Float[np.ndarray, "nodes 3"] | None  # forces [eV/Å] or relaxed positions [Å]


class Predictor(abc.ABC):
    """A model as used for a leaderboard."""

    potential: Potential

    @property
    @abc.abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """All that outcomes depend on beside the weights, JSON-able."""

    @property
    @abc.abstractmethod
    def part_size(self) -> int:
        """Systems in a part unless told otherwise."""

    @abc.abstractmethod
    def prepare(self, frames: Sequence[CatalystFrame]) -> None:
        """Chooses shapes of batches that suit ``frames``."""

    @abc.abstractmethod
    def __call__(self, frames: Sequence[CatalystFrame], folder: Path) -> Iterator[Outcome]:
        """An outcome for each frame, in order, a function of them and of what was prepared.

        ``folder`` is for what a killed run is to find again of work that takes long.
        """


class SinglePoint(Predictor):
    """Energies, and forces if ``forces``, of structures as they are: S2EF and direct IS2RE."""

    def __init__(
        self,
        potential: Potential,
        *,
        forces: bool,
        dtype: str = "float32",
        batch_nodes: int = BATCH_NODES,
    ):
        self.potential, self.forces = potential, forces
        self.dtype, self.batch_nodes = dtype, batch_nodes

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"by": "single points", "dtype": self.dtype, "batch_nodes": self.batch_nodes}

    @property
    def part_size(self) -> int:
        return 1024

    def prepare(self, frames: Sequence[CatalystFrame]) -> None:
        structures = [frame.structure for frame in frames]
        self._plan = self.potential.plan_budgets(structures, batch_nodes=self.batch_nodes)

    def __call__(self, frames: Sequence[CatalystFrame], folder: Path) -> Iterator[Outcome]:
        stream = self.potential.predict_stream(
            [frame.structure for frame in frames],
            dtype=self.dtype,
            batch_nodes=self.batch_nodes,
            budgets=copy.deepcopy(self._plan),
        )
        for result in stream:
            yield Outcome(result.energy, result.forces if self.forces else None)


@dataclasses.dataclass(frozen=True)
class PartFile:
    """One part: systems ``start`` to ``stop`` of a split."""

    folder: Path
    split: str
    start: int
    stop: int

    @property
    def path(self) -> Path:
        return self.folder / self.split / f"{self.start:09d}-{self.stop:09d}.npz"

    @property
    def under_way(self) -> Path:
        """A folder that is there while the part is computed."""
        return self.path.with_suffix("")


class PartContent(NamedTuple):
    """The systems of a part, one after the other."""

    ids: np.ndarray  # text
    energy: Float[np.ndarray, " systems"]  # [eV] float32
    num_atoms: Int[np.ndarray, " systems"]
    free: Bool[np.ndarray, " nodes"]
    vectors: Float[np.ndarray, "vector_nodes 3"]  # float32; none where the task has none

    @classmethod
    def read(cls, part: PartFile) -> "PartContent":
        with np.load(part.path, allow_pickle=False) as arrays:
            return cls(*(arrays[field] for field in cls._fields))


def plan_parts(
    sources: Mapping[str, CatalystSource], folder: Path, part_size: int
) -> list[PartFile]:
    """All parts of a run, in order."""
    if part_size < 1:
        raise ValueError(f"part_size is {part_size}, expected at least 1 system.")
    return [
        PartFile(folder, split, start, min(start + part_size, len(source)))
        for split, source in sources.items()
        for start in range(0, len(source), part_size)
    ]


def predict_parts(
    task: Task,
    predictor: Predictor,
    sources: Mapping[str, CatalystSource],
    folder: Path,
    *,
    part_size: int | None = None,  # None: the predictor's
    share: tuple[int, int] = (0, 1),
    references: Mapping[int, float] | None = None,  # [eV] by sid
    advance: Callable[[int], None] = lambda systems: None,
) -> list[PartFile]:
    """Computes the parts that ``folder`` lacks; those that are missing afterwards.

    With ``share = (i, n)`` only every n-th part from the i-th on, so that n processes, on any
    machines that see ``folder``, do it all. ``references`` turn a model's total energies into
    adsorption energies. ``advance`` is told of systems done.

    Raises ``ValueError`` when the model's energies are not those of the task and cannot be
    converted, when ``folder`` holds parts of another run, and for predictions that are not finite.
    """
    index, count = share
    if not 0 <= index < count:
        raise ValueError(f"share is {index} of {count}, expected 0 <= index < count.")
    part_size = predictor.part_size if part_size is None else part_size
    to_task = _conversion(task, predictor.potential.energy_reference, references)
    open_run_folder(folder, _facts(task, predictor, sources, part_size, references))
    parts = plan_parts(sources, folder, part_size)
    share_of_parts = parts[index::count]
    mine = [part for part in share_of_parts if not part.path.exists()]
    systems, left = (sum(p.stop - p.start for p in some) for some in (share_of_parts, mine))
    advance(systems - left)
    if mine:
        first = (source.frames(stop=_PLANNED) for source in sources.values())
        predictor.prepare(list(itertools.chain.from_iterable(first)))
    for part in mine:
        frames = list(sources[part.split].frames(part.start, part.stop))
        outcomes = predictor(frames, part.under_way)
        _write(part, task, [to_task(f, o) for f, o in zip(frames, outcomes, strict=True)], frames)
        if part.under_way.exists():
            shutil.rmtree(part.under_way)
        advance(part.stop - part.start)
    return [part for part in parts if not part.path.exists()]


def _conversion(
    task: Task, model_reference: EnergyReference, references: Mapping[int, float] | None
) -> Callable[[CatalystFrame, Outcome], Outcome]:
    if task.kind is Kind.IS2RS:  # no energies in the file
        return lambda frame, outcome: outcome
    wanted = (EnergyReference.TOTAL, EnergyReference.ADSORPTION)
    if (model_reference, task.energy_reference) == wanted and references is not None:
        return lambda frame, outcome: outcome._replace(
            energy=outcome.energy - reference_of(references, frame.sid)
        )
    require_same_reference(
        model_reference,
        task.energy_reference,
        f"{task.name} takes {task.energy_reference.value} energies; writing its file",
    )
    return lambda frame, outcome: outcome


def _write(
    part: PartFile, task: Task, outcomes: Sequence[Outcome], frames: Sequence[CatalystFrame]
) -> None:
    ids = [_id(task, frame) for frame in frames]
    vectors = [o.vectors for o in outcomes if o.vectors is not None]
    content = PartContent(
        ids=np.array(ids),
        energy=np.array([o.energy for o in outcomes]).astype(np.float32),
        num_atoms=np.array([frame.structure.num_nodes for frame in frames], np.int64),
        free=np.concatenate([frame.free for frame in frames]),
        vectors=np.concatenate([np.zeros((0, 3)), *vectors]).astype(np.float32),
    )
    for system, outcome in zip(ids, outcomes, strict=True):
        there = [np.array(outcome.energy), *([] if outcome.vectors is None else [outcome.vectors])]
        if not all(np.isfinite(values).all() for values in there):
            raise ValueError(
                f"The prediction for {part.split} {system} is not finite. Atoms may be too close "
                "for the model; try dtype float64."
            )
    write_arrays(part.path, content._asdict())


def _id(task: Task, frame: CatalystFrame) -> str:
    if task.kind is not Kind.S2EF:
        return str(frame.sid)
    if frame.fid is None:
        raise ValueError(
            f"Structure {frame.structure.name} (sid {frame.sid}) has no fid; expected frames of "
            f"S2EF for {task.name}. Is this the IS2RE data?"
        )
    return frame.id


def _facts(
    task: Task,
    predictor: Predictor,
    sources: Mapping[str, CatalystSource],
    part_size: int,
    references: Mapping[int, float] | None,
) -> dict[str, Any]:
    """What a run is: parts with other facts do not belong together."""
    known = json.dumps(sorted((references or {}).items()))
    return {
        "task": task.name,
        "model": predictor.potential.name,
        "model_sha256": predictor.potential.model_sha256(),
        "references_sha256": hashlib.sha256(known.encode()).hexdigest(),
        "part_size": part_size,
        "systems": {split: len(source) for split, source in sources.items()},
        "data": {split: source.fingerprint() for split, source in sources.items()},
        **predictor.facts,
    }
